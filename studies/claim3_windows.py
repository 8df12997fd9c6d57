"""Claim 3: windows of a middle size beat one window for the whole image, and windows of one token (paper Table 4a).

All networks have 64 latents in all, as many as tokens, and keep all of them; only how they are grouped differs.
"""

from collections.abc import Sequence
from dataclasses import replace

from arms import FULL, matched, train_or_load
from command import arguments
from record import Record, Values
from scoring import draw, held_out_loss, score

WINDOWS = (8, 4, 1)
MIDDLE, NONE, SINGLE = "windows of 4×4", "windows of 8×8", "windows of 1×1"


def main(line: Sequence[str] | None = None) -> None:
    args = arguments(line, __doc__, __file__)
    record = Record(args, 3, "ELIT-DiT at full budget on 8×8 tokens; 16 Euler steps, no guidance")
    for other, says in ((NONE, "one window of 8×8, no grouping"), (SINGLE, "windows of one token")):
        for metric in ("loss", "FD"):

            def advantage(values: Values, seed: int, other: str = other, metric: str = metric) -> float:
                return values[other, metric][seed] - values[MIDDLE, metric][seed]

            record.part(f"{MIDDLE} have the lower {metric} than {says}", metric, advantage)

    for seed in range(args.seeds):
        for side in WINDOWS:
            name, model = f"windows of {side}×{side}", replace(FULL, window=(side, side))
            config = matched(args, seed, model, budget_min=side**2, budget_max=side**2)
            record.arm(name, config)
            network = train_or_load(args, config)
            scores = score(*draw(network, args.samples, steps=16))
            record.add(name, seed, loss=held_out_loss(args, network), **scores)
        record.save(range(seed + 1))


if __name__ == "__main__":
    main()
