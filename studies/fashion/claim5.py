"""Claim 5: one multi-budget network beats networks trained for one budget each (paper Table 8)."""

from collections.abc import Sequence

from study import Study

SEPARATE = {16: "ELIT", 4: "ELIT 25%"}


def main(line: Sequence[str] | None = None) -> None:
    study = Study("claim5", __doc__, line)
    for budget, arm in SEPARATE.items():
        for seed in study.args.seeds:
            study.curve("ELIT multi-budget", seed, budget=budget, way=f", {budget} of 16")
            study.curve(arm, seed, budget=budget, way=f", {budget} of 16")
        says = f"the joint network has a lower FD at {budget} of 16 latents"
        study.compare(says, f"ELIT multi-budget, {budget} of 16", f"{arm}, {budget} of 16")
    study.write("each network with the same training FLOPs; Euler, no guidance")


if __name__ == "__main__":
    main()
