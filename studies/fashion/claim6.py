"""Claim 6: at equal FLOPs fewer tokens beat fewer steps (paper Figures 8 and 14), and CCFG is no worse than CFG at a
third less cost (Figure 5).

CFG, CCFG and AG are compared at the scale at which CFG's FD is best, and each over all scales in the plot. Fewer steps
get their number rounded up, in their favour.
"""

import math
from collections.abc import Sequence
from typing import Any

from scores import draw_and_score
from study import Study

from elit import AG, CCFG, CFG
from elit.costs.flops import count_flops

PAIRS = ((4, 24), (8, 24), (4, 16), (8, 16))  # latents and steps of the runs with fewer tokens
SCALES = (1.25, 1.5, 2.0, 3.0)
GUIDED_STEPS = 16
WEAK = 1


def main(line: Sequence[str] | None = None) -> None:
    study = Study("claim6", __doc__, line)
    pairs: list[tuple[str, str]] = []
    for seed in study.args.seeds:
        step, model = study.network("ELIT multi-budget", seed)

        def scored(name: str, seed: int = seed, step: int = step, model: Any = model, **settings: Any) -> None:
            key = {"arm": "ELIT multi-budget", "seed": seed, "step": step, "name": name, "samples": study.args.samples}
            scores = study.scores.get(key, lambda: draw_and_score(model, count=study.args.samples, **settings))
            study.row(name, seed, scores)

        pairs = []
        for latents, steps in PAIRS:
            few = math.ceil(steps * count_flops(model, budget=latents) / count_flops(model) - 1e-9)
            pairs.append((f"{latents} of 16, {steps} steps", f"16 of 16, {few} steps"))
            scored(pairs[-1][0], steps=steps, budget=latents)
            scored(pairs[-1][1], steps=few)
        for scale in SCALES:
            for kind, guidance in {"CFG": CFG(scale), "CCFG": CCFG(scale, WEAK), "AG": AG(scale, WEAK)}.items():
                scored(f"{kind}, scale {scale}", steps=GUIDED_STEPS, guidance=guidance)
        scored("no guidance", steps=GUIDED_STEPS)
    for fewer_tokens, fewer_steps in pairs:
        study.compare(f"{fewer_tokens} have a lower FD than {fewer_steps}", fewer_tokens, fewer_steps)

    first = study.seeds[0]
    best = min(SCALES, key=lambda scale: study.last(f"CFG, scale {scale}", first)["FD"])
    study.compare(f"guidance helps: CFG at scale {best} has a lower FD than none", f"CFG, scale {best}", "no guidance")
    says = f"CCFG is no worse than CFG at CFG's best scale, {best}, to 5%"
    study.compare(says, f"CCFG, scale {best}", f"CFG, scale {best}", allowed=0.05)
    study.write(f"multi-budget ELIT; guided runs: all latents, {GUIDED_STEPS} steps, weak branch with {WEAK} of 16")


if __name__ == "__main__":
    main()
