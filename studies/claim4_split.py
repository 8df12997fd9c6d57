"""Claim 4: about two thirds of the blocks in the core is best, no head and no tail is clearly worse (paper Table 4b).

Six blocks and all latents in every network, so all cost the same; only where Read and Write stand differs.
"""

from collections.abc import Sequence
from dataclasses import replace

import common

SPLITS = ((0, 6, 0), (1, 4, 1), (2, 2, 2))
BEST, BARE, THIN = "1–4–1", "0–6–0", "2–2–2"


def main(line: Sequence[str] | None = None) -> None:
    args = common.arguments(line, __doc__, __file__)
    record = common.Record(args, 4, "ELIT-DiT at full budget, head–core–tail of 6 blocks; 16 Euler steps, no guidance")
    for other in (BARE, THIN):
        for metric in ("loss", "FD"):

            def advantage(values: common.Values, seed: int, other: str = other, metric: str = metric) -> float:
                return values[other, metric][seed] - values[BEST, metric][seed]

            record.part(f"{BEST} has the lower {metric} than {other}", metric, advantage)

    for seed in range(args.seeds):
        for split in SPLITS:
            name, model = "–".join(map(str, split)), replace(common.FULL, split=split)
            config = common.matched(args, seed, model, budget_min=common.LATENTS, budget_max=common.LATENTS)
            record.arm(name, config)
            network = common.train_or_load(args, config)
            found = common.score(*common.draw(network, args.samples, steps=16))
            record.add(name, seed, loss=common.held_out_loss(args, network), **found)
        record.save(range(seed + 1))


if __name__ == "__main__":
    main()
