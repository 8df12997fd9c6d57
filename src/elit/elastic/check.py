"""check_family: tries out on a transformer and one of its calls whether the `Family` of its class is right."""

import copy
import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from elit.elastic.context import budget
from elit.elastic.cost import count_block_flops
from elit.elastic.families import FAMILIES, family_of
from elit.elastic.families.family import Model, Places, Take
from elit.elastic.recording import output_tensor
from elit.elastic.surgery import elastify
from elit.elastic.trees import Arguments, Tree


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
    as the budget does, and is larger with positions of other tokens; FLOPs within 2% of `count_block_flops`. Raises
    ValueError where `elit.elastify` does, and whatever the transformer's own forward raises for `call`.
    """
    with torch.no_grad():
        right = _run(copy.deepcopy(transformer).eval(), call)
    trial = _Trial(elastify(copy.deepcopy(transformer).eval(), **settings), call, right)
    tests = {
        "equal at full budget": trial.equal,
        "error and budget": trial.error,
        "positions": trial.positions,
        "FLOPs": trial.flops,
    }
    findings = {}
    for name, test in tests.items():
        try:
            findings[name] = test()
        except Exception as error:  # what a wrong entry breaks may be anything; it is the finding
            reason = (str(error).strip() or "no message").splitlines()[0]
            findings[name] = f"raised {type(error).__name__}: {reason}"
    return FamilyReport(findings)


def _run(model: Model, call: Arguments) -> Tensor:
    return output_tensor(model(**call, **({"return_dict": False} if hasattr(model, "config") else {})))


class _Trial:
    """Tests, each of which returns a problem in words, or None."""

    def __init__(self, elastic: Model, call: Arguments, right: Tensor):
        self.elastic, self.call, self.right, self.family = elastic, call, right, family_of(elastic)
        self.budgets = [elastic.budgets[-1]]  # all of a window's tokens, half of them, and so on to one
        while self.budgets[-1] > 1:
            self.budgets.append(self.budgets[-1] // 2)

    def at(self, count: int) -> Tensor:
        with torch.no_grad(), budget(count, doubled=False):
            return _run(self.elastic, self.call)

    def error_at(self, count: int) -> float:
        return (self.at(count) - self.right).square().mean().sqrt().item()

    def equal(self) -> str | None:
        if torch.equal(self.at(self.budgets[0]), self.right):
            return None
        return "outputs differ; `tokens`, `joined`, `before`, `output` or `grids` point at tokens beside the image's"

    def error(self) -> str | None:
        errors = []
        for count in self.budgets:
            try:
                errors.append(self.error_at(count))
            except (RuntimeError, IndexError, ValueError, TypeError) as error:
                return (
                    f"at {count} tokens a window: {str(error).splitlines()[0]}; an argument of the blocks that has an "
                    "entry for each token is missing in `per_token`, or wrong there"
                )
        if errors[-1] == 0:
            return "none at the smallest budget: no token was dropped, or Write takes the tokens before the core"
        if not all(low >= 0.95 * high for high, low in itertools.pairwise(errors)):
            listed = ", ".join(f"{count}: {error:.3g}" for count, error in zip(self.budgets, errors, strict=True))
            return (
                f"it falls as the budget falls, or is not finite ({listed}); latents may come back to other tokens "
                "than they came from, or the network has branches at zero"
            )
        return None

    def positions(self) -> str | None:
        """With one token a window dropped, the error is larger where kept tokens get the first ones' entries."""
        count, used = self.elastic.budgets[-1] - 1, []

        def shifted(take: Take) -> Take:
            def wrong(value: Tree, places: Places) -> Tree:
                used.append(take)
                first = torch.arange(places.sequence.shape[-1], device=places.image.device)
                return take(value, Places(first[: len(places.image)], first.expand_as(places.sequence), places.tokens))

            return wrong

        others = {argument: shifted(take) for argument, take in self.family.per_token.items()}
        name, error = self.elastic.elastic_record.kind, self.error_at(count)
        FAMILIES[name] = dataclasses.replace(self.family, per_token=others)
        try:
            wrong = self.error_at(count)
        finally:
            FAMILIES[name] = self.family
        if used and wrong < 1.002 * error:
            return (
                f"with {count} tokens a window the error is {error:.3g}, and {wrong:.3g} with the entries of other "
                "tokens: what `per_token` takes may not be the kept tokens'"
            )
        return None

    def flops(self) -> str | None:
        tokens, text = self.family.grids(self.elastic, self.call), self.family.text(self.elastic, self.call)
        counted, measured = [], []
        for count in (self.budgets[0], self.budgets[len(self.budgets) // 2]):
            cost = count_block_flops(self.elastic, tokens=tokens, text_tokens=text, budget=count)
            counted.append(len(self.call[self.family.sample]) * cost)
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                self.at(count)
            measured.append(counter.get_total_flops())
        saving, expected = measured[0] - measured[1], counted[0] - counted[1]
        if abs(saving - expected) <= 0.02 * saving:
            return None
        return f"half of the tokens saves {saving:,}, `streams` and `attention` say {expected:,}: more than 2% off"
