"""Claim 6: at equal FLOPs fewer tokens beat fewer steps (paper Figures 8 and 14); CCFG is no worse than CFG at a third
less cost (Figure 5), and saturates a little sooner (Figure 15).

One multi-budget network a seed, sampled in many ways. Fewer steps get their number rounded up, in their favour. The
digits have no colours: what saturates is contrast, measured as how far pixels leave [-1, 1] on average ("overshoot")
before they are clipped, beside their standard deviation over that of the real digits ("contrast").
"""

import math
from collections.abc import Sequence

from arms import FULL, matched, train_or_load
from command import arguments
from record import Record, Values
from scoring import draw, sampling_gflops, score
from torch import Tensor

from elit import AG, CCFG, CFG
from elit.costs.flops import count_flops
from elit.data.builtin import digits
from elit.flow.guidance import Guidance
from elit.models.dit import DiT

PAIRS = ((4, 16), (8, 8), (4, 8))  # latents and steps of the runs with fewer tokens
SCALES = (1.5, 3.0)
GUIDED_STEPS = 8
WEAK = 1  # latents in the weak branch of CCFG and AG
MARGIN = 0.05  # "no worse" means at most so much worse


def equal_steps(model: DiT, budget: int, steps: int) -> int:
    """How many steps with all latents cost as much, rounded up."""
    return math.ceil(steps * count_flops(model, budget=budget) / count_flops(model) - 1e-9)


def saturation(images: Tensor) -> dict[str, float]:
    beyond = (images.abs() - 1).clamp(min=0).mean().item()
    return {"overshoot": beyond, "contrast": images.clamp(-1, 1).std().item() / digits().images.std().item()}


def guidances(scale: float) -> dict[str, Guidance]:
    return {"CFG": CFG(scale), "CCFG": CCFG(scale, WEAK), "AG": AG(scale, WEAK)}


def best(values: Values, seed: int, kind: str) -> float:
    return min(values[f"{kind}, scale {scale}", "FD"][seed] for scale in SCALES)


def main(line: Sequence[str] | None = None) -> None:
    args = arguments(line, __doc__, __file__)
    notes = f"multi-budget ELIT-DiT, Euler; guided runs: all latents, {GUIDED_STEPS} steps, weak branch of CCFG and AG "
    record = Record(args, 6, f"{notes}with {WEAK} of 16 latents")
    config = matched(args, 0, FULL)
    example = train_or_load(args, config)
    for budget, steps in PAIRS:
        few = equal_steps(example, budget, steps)

        def advantage(values: Values, seed: int, budget: int = budget, steps: int = steps, few: int = few) -> float:
            return values[f"16 of 16, {few} steps", "FD"][seed] - values[f"{budget} of 16, {steps} steps", "FD"][seed]

        says = f"{budget} of 16 latents in {steps} steps have the lower FD than all of them in {few}"
        record.part(f"fewer tokens, {steps} steps: {says}", "FD", advantage)
    record.part(
        f"CCFG's best FD over the scales is at most {MARGIN:.0%} above CFG's",
        "FD",
        lambda values, seed: (1 + MARGIN) * best(values, seed, "CFG") - best(values, seed, "CCFG"),
    )
    record.part(
        "CCFG overshoots more than CFG, mean over the scales",
        "overshoot",
        lambda values, seed: (
            sum(
                values[f"CCFG, scale {scale}", "overshoot"][seed] - values[f"CFG, scale {scale}", "overshoot"][seed]
                for scale in SCALES
            )
            / len(SCALES)
        ),
    )

    for seed in range(args.seeds):
        config = matched(args, seed, FULL)
        record.arm("multi-budget", config)
        model = train_or_load(args, config)
        unguided = [*PAIRS, *((16, equal_steps(model, *pair)) for pair in PAIRS)]
        for budget, steps in dict.fromkeys(unguided):
            cost = sampling_gflops(model, steps=steps, budget=budget)
            scores = score(*draw(model, args.samples, steps=steps, budget=budget))
            record.add(f"{budget} of 16, {steps} steps", seed, GFLOPs=cost, **scores)
        for scale in SCALES:
            for kind, guidance in guidances(scale).items():
                cost = sampling_gflops(model, steps=GUIDED_STEPS, guidance=guidance)
                images, labels = draw(model, args.samples, steps=GUIDED_STEPS, guidance=guidance)
                scores = score(images, labels) | saturation(images)
                record.add(f"{kind}, scale {scale}", seed, GFLOPs=cost, **scores)
        record.save(range(seed + 1))


if __name__ == "__main__":
    main()
