"""Claim 4: about two thirds of the blocks in the core is best, no head and no tail is clearly worse (paper Table 4b).

Six blocks and all latents in every network, so all cost the same; only where Read and Write stand differs.
"""

from collections.abc import Sequence
from dataclasses import replace

from arms import FULL, LATENTS, matched, train_or_load
from command import arguments
from record import Record, Values
from scoring import draw, held_out_loss, score

SPLITS = ((0, 6, 0), (1, 4, 1), (2, 2, 2))
BEST, BARE, THIN = "1–4–1", "0–6–0", "2–2–2"


def main(line: Sequence[str] | None = None) -> None:
    args = arguments(line, __doc__, __file__)
    record = Record(args, 4, "ELIT-DiT at full budget, head–core–tail of 6 blocks; 16 Euler steps, no guidance")
    for other in (BARE, THIN):
        for metric in ("loss", "FD"):

            def advantage(values: Values, seed: int, other: str = other, metric: str = metric) -> float:
                return values[other, metric][seed] - values[BEST, metric][seed]

            record.part(f"{BEST} has the lower {metric} than {other}", metric, advantage)

    for seed in range(args.seeds):
        for split in SPLITS:
            name, model = "–".join(map(str, split)), replace(FULL, split=split)
            config = matched(args, seed, model, budget_min=LATENTS, budget_max=LATENTS)
            record.arm(name, config)
            network = train_or_load(args, config)
            scores = score(*draw(network, args.samples, steps=16))
            record.add(name, seed, loss=held_out_loss(args, network), **scores)
        record.save(range(seed + 1))


if __name__ == "__main__":
    main()
