"""Claim 5: one multi-budget network beats networks trained for one budget each, at every budget (paper Table 8).

Every network gets the same training FLOPs: those for fewer latents see more images. The multi-budget one is trained
once, so the separate ones together had twice its FLOPs.
"""

from collections.abc import Sequence

from arms import FULL, matched, train_or_load
from command import arguments
from record import Record, Values
from scoring import draw, held_out_loss, score

BUDGETS = (16, 4)


def main(line: Sequence[str] | None = None) -> None:
    args = arguments(line, __doc__, __file__)
    record = Record(args, 5, "ELIT-DiT, 16 latents in each of 4 windows; 16 Euler steps, no guidance")
    for budget in BUDGETS:
        for metric in ("loss", "FD"):

            def advantage(values: Values, seed: int, budget: int = budget, metric: str = metric) -> float:
                return (
                    values[f"separate, {budget} of 16", metric][seed] - values[f"joint, {budget} of 16", metric][seed]
                )

            record.part(f"the joint network has the lower {metric} at {budget} of 16 latents", metric, advantage)

    for seed in range(args.seeds):
        config = matched(args, seed, FULL)
        record.arm("joint", config)
        joint = train_or_load(args, config)
        for budget in BUDGETS:
            config = matched(args, seed, FULL, budget_min=budget, budget_max=budget)
            record.arm(f"separate, {budget} of 16", config)
            separate = train_or_load(args, config)
            for name, model in (("joint", joint), ("separate", separate)):
                scores = score(*draw(model, args.samples, steps=16, budget=budget))
                record.add(f"{name}, {budget} of 16", seed, loss=held_out_loss(args, model, budget), **scores)
        record.save(range(seed + 1))


if __name__ == "__main__":
    main()
