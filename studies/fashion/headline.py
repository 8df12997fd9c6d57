"""The headline: DiT, ELIT and multi-budget ELIT at equal training FLOPs (the paper, 256px: FID 13.0, 8.2, 7.8)."""

from collections.abc import Sequence

from study import Study


def main(line: Sequence[str] | None = None) -> None:
    study = Study("headline", __doc__, line)
    for seed in study.args.seeds:
        for arm in ("DiT", "ELIT", "ELIT multi-budget"):
            study.curve(arm, seed)
    study.compare("ELIT has a lower FD than DiT", "ELIT", "DiT")
    study.compare("multi-budget ELIT has a lower FD than DiT", "ELIT multi-budget", "DiT")
    study.compare("multi-budget ELIT is no worse than ELIT, to 5%", "ELIT multi-budget", "ELIT", allowed=0.05)
    study.write("all latents, Euler, no guidance")


if __name__ == "__main__":
    main()
