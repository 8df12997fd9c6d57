"""Claim 3: windows of a middle size beat one window for the whole image, and windows of one token (paper Table 4a).

All networks have 64 latents in all, as many as tokens, and keep all of them; only how they are grouped differs.
"""

from collections.abc import Sequence
from dataclasses import replace

import common

WINDOWS = (8, 4, 1)
MIDDLE, NONE, SINGLE = "windows of 4×4", "windows of 8×8", "windows of 1×1"


def main(line: Sequence[str] | None = None) -> None:
    args = common.arguments(line, __doc__, __file__)
    record = common.Record(args, 3, "ELIT-DiT at full budget on 8×8 tokens; 16 Euler steps, no guidance")
    for other, says in ((NONE, "one window of 8×8, no grouping"), (SINGLE, "windows of one token")):
        for metric in ("loss", "FD"):

            def advantage(values: common.Values, seed: int, other: str = other, metric: str = metric) -> float:
                return values[other, metric][seed] - values[MIDDLE, metric][seed]

            record.part(f"{MIDDLE} have the lower {metric} than {says}", metric, advantage)

    for seed in range(args.seeds):
        for side in WINDOWS:
            name, model = f"windows of {side}×{side}", replace(common.FULL, window=(side, side))
            config = common.matched(args, seed, model, budget_min=side**2, budget_max=side**2)
            record.arm(name, config)
            network = common.train_or_load(args, config)
            found = common.score(*common.draw(network, args.samples, steps=16))
            record.add(name, seed, loss=common.held_out_loss(args, network), **found)
        record.save(range(seed + 1))


if __name__ == "__main__":
    main()
