"""Claim 4: about two thirds of the blocks in the core is best; none in head and tail is clearly worse (Table 4b)."""

from collections.abc import Sequence

from study import Study


def main(line: Sequence[str] | None = None) -> None:
    study = Study("claim4", __doc__, line)
    for seed in study.args.seeds:
        for arm in ("ELIT", "ELIT 0-6-0", "ELIT 2-2-2"):
            study.curve(arm, seed)
    study.compare("1-4-1 has a lower FD than 0-6-0", "ELIT", "ELIT 0-6-0")
    study.compare("1-4-1 has a lower FD than 2-2-2", "ELIT", "ELIT 2-2-2")
    study.write("one budget, all latents, Euler, no guidance")


if __name__ == "__main__":
    main()
