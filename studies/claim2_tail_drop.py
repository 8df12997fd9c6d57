"""Claim 2: tail drop beats random drop at low budgets (paper Table 4c).

Two multi-budget networks from the same seeds: one drops the last latents in training, the other a random set of them.
To the second any set is as good as another, so it is scored twice: on the first latents, and on a set drawn anew for
every evaluation. The claim has to win against the better of the two.
"""

from collections.abc import Sequence

import torch
from arms import FULL, matched, train_or_load
from command import arguments
from random_drop import RandomDropDiT
from record import Record, Values
from scoring import draw, held_out_loss, score

from elit.models.dit import DiT

BUDGETS = (16, 4, 2, 1)
LOW = (4, 2, 1)  # 25% of the latents and below


def main(line: Sequence[str] | None = None) -> None:
    args = arguments(line, __doc__, __file__)
    record = Record(args, 2, "multi-budget ELIT-DiT, 16 latents in each of 4 windows; 16 Euler steps")
    for budget in LOW:
        for metric in ("loss", "FD"):

            def advantage(values: Values, seed: int, budget: int = budget, metric: str = metric) -> float:
                ways = [values[f"random drop, {way}, {budget} of 16", metric][seed] for way in ("first", "redrawn")]
                return min(ways) - values[f"tail drop, {budget} of 16", metric][seed]

            record.part(f"tail drop has the lower {metric} at {budget} of 16 latents", metric, advantage)

    for seed in range(args.seeds):
        config = matched(args, seed, FULL)
        tail = train_or_load(args, config)
        random = train_or_load(args, config, RandomDropDiT)
        first = DiT.from_config(random.config).eval().to(args.device)
        first.load_state_dict(random.state_dict())
        ways = {"tail drop": tail, "random drop, first": first, "random drop, redrawn": random}
        for name, model in ways.items():
            record.arm(name, config)
            for budget in BUDGETS:
                torch.manual_seed(seed)  # of the sets that are drawn anew
                scores = score(*draw(model, args.samples, steps=16, budget=budget))
                record.add(f"{name}, {budget} of 16", seed, loss=held_out_loss(args, model, budget), **scores)
        record.save(range(seed + 1))


if __name__ == "__main__":
    main()
