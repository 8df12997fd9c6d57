"""check_family: tries out on a transformer and one of its calls whether the `Family` of its class is right."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from elit.elastic.context import budget
from elit.elastic.cost import count_block_flops
from elit.elastic.families import family_of
from elit.elastic.families.family import Arguments, Model
from elit.elastic.pipelines import one_line, output_tensor
from elit.elastic.surgery import elastify


@dataclass(frozen=True)
class FamilyReport:
    """The result of `check_family`; printed, a line a test."""

    findings: Mapping[str, str | None]
    """The problem that each test found; None where it passed."""

    @property
    def passed(self) -> bool:
        return not any(self.findings.values())

    def __str__(self) -> str:
        return "\n".join(f"{test}: {problem or 'passed'}" for test, problem in self.findings.items())


def check_family(transformer: Model, call: Arguments, **settings: Any) -> FamilyReport:
    """Tries on a copy of `transformer` all that has to hold for its class's `Family`, and reports what does not.

    call: keyword arguments of one forward, a batch of a few samples; a small network of random weights does, in which
    nothing starts at zero. settings: of `elit.elastify`, read_after, write_after and window, where its defaults do not
    suit so small a network.

    The tests: equal to the original at full budget, to the bit; runs at every budget, with an error that does not fall
    as the budget does; FLOPs within 2% of `count_block_flops`. Raises ValueError where `elit.elastify` does, and
    whatever the transformer's own forward raises for `call`.
    """
    right, _ = _run(copy.deepcopy(transformer).eval(), call)
    elastic = elastify(copy.deepcopy(transformer).eval(), **settings)
    full = elastic.budgets[-1]
    counts = [full >> halvings for halvings in range(full.bit_length())]  # all of a window's tokens, half of them, …
    equal = dial = flops = None
    errors, measured = [], []
    try:
        for count in counts:
            with budget(count, doubled=False):
                output, number = _run(elastic, call)
            errors.append((output - right).square().mean().sqrt().item())
            measured.append(number)
            if count == counts[0] and not torch.equal(output, right):
                equal = "outputs differ; `tokens`, `joined`, `before`, `output` or `grids` take others than the image's"
    except Exception as error:  # what a wrong entry breaks may be anything; it is the finding
        raised = f"raised {type(error).__name__}: {one_line(error)}"
        if not errors:
            return FamilyReport({"equal at full budget": raised, "error and budget": "not tried", "FLOPs": "not tried"})
        missing = "an argument of the blocks that has an entry for each token is missing in `per_token`, or wrong there"
        dial = f"at {counts[len(errors)]} tokens a window: {raised}; {missing}"
    if dial is None and errors[-1] == 0:
        dial = "none at the smallest budget: no token was dropped, or Write takes the tokens before the core"
    if dial is None and not all(low >= 0.95 * high for high, low in pairwise(errors)):
        listed = ", ".join(f"{count}: {error:.3g}" for count, error in zip(counts, errors, strict=True))
        dial = f"it falls as the budget falls, or is not finite ({listed}): latents come back to other tokens"
    if len(measured) > 1:
        family, half = family_of(elastic), len(measured) // 2
        sizes = {"tokens": family.grids(elastic, call), "text_tokens": family.text(elastic, call)}
        counted = [count_block_flops(elastic, **sizes, budget=count) for count in (counts[0], counts[half])]
        saving, expected = measured[0] - measured[half], len(right) * (counted[0] - counted[1])
        if abs(saving - expected) > 0.02 * saving:
            flops = f"half of the tokens saves {saving:,}, `streams` and `attention` say {expected:,}: more than 2% off"
    return FamilyReport({"equal at full budget": equal, "error and budget": dial, "FLOPs": flops})


def _run(model: Model, call: Arguments) -> tuple[Tensor, int]:
    """The prediction, and the FLOPs that it took."""
    options = {"return_dict": False} if hasattr(model, "config") else {}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = output_tensor(model(**call, **options))
    return output, counter.get_total_flops()
