"""check_family: whether a `Family` says of its class what is true, tried out on a transformer and one of its calls."""

import copy
import dataclasses
import itertools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from elit.arguments import shortened
from elit.elastic.context import budget
from elit.elastic.cost import count_block_flops
from elit.elastic.families import family_of, registered
from elit.elastic.families.family import Places, Take
from elit.elastic.load import load_elastic
from elit.elastic.surgery import elastify
from elit.models.layout import Shape


@dataclass(frozen=True)
class Finding:
    """What one of the tests came to."""

    test: str
    problem: str | None
    """None where it passed."""


@dataclass(frozen=True)
class FamilyReport:
    """What `check_family` came to; printed, a line a test."""

    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        return not any(finding.problem for finding in self.findings)

    def __str__(self) -> str:
        return "\n".join(f"{each.test}: {each.problem or 'passed'}" for each in self.findings)


class _Wrong(Exception):
    """A test that did not pass, in words."""


def check_family(transformer: Any, call: Mapping[str, Any], **settings: Any) -> FamilyReport:
    """Tries on a copy of `transformer` what has to hold for its class's `Family`, and says in words what does not.

    call: keyword arguments of one forward, a batch of a few samples; a small network of random weights does, in which
    nothing starts at zero. settings: of `elit.elastify`, read_after, write_after and window, where its defaults do not
    suit so small a network.

    The tests: equal to the original at full budget, to the bit, and its gradients within 1e-5; runs at every budget
    asked for; an error that does not fall as the budget does, and is larger with positions of other tokens; FLOPs
    within 2% of `count_block_flops`; the same after save_pretrained and load_elastic. Raises ValueError where
    `elit.elastify` does, and for a call that the transformer's own forward does not take.
    """
    family = family_of(transformer)
    original, elastic = copy.deepcopy(transformer).eval(), elastify(copy.deepcopy(transformer).eval(), **settings)
    _check_call(original, call)
    try:
        grids = family.grids(transformer, call)
    except Exception as error:  # as below: a wrong entry
        return FamilyReport((Finding("grids", _in_words(error)),))
    trial = _Trial(original, elastic, dict(call), grids, family)
    tests: dict[str, Callable[[], None]] = {
        "equal at full budget": trial.equal,
        "gradients at full budget": trial.gradients,
        "runs at every budget": trial.runs,
        "error and budget": trial.error,
        "positions": trial.positions,
        "FLOPs": trial.flops,
        "save and load": trial.saved,
    }
    findings = []
    for name, test in tests.items():
        try:
            test()
        except _Wrong as wrong:
            findings.append(Finding(name, str(wrong)))
        except Exception as error:  # what a wrong entry breaks may be anything; it is the finding
            findings.append(Finding(name, _in_words(error)))
        else:
            findings.append(Finding(name, None))
    return FamilyReport(tuple(findings))


def _check_call(original: Any, call: Any) -> None:
    if not isinstance(call, Mapping) or not all(isinstance(name, str) for name in call):
        raise ValueError(f"call={shortened(call)}: give the keyword arguments of a forward, a dict by name")
    try:
        with torch.no_grad():
            original(**call)
    except Exception as error:  # whatever a forward raises when it is handed something else
        name = type(original).__name__
        raise ValueError(f"call: {name}'s own forward does not take it, it {_in_words(error)}") from error


def _in_words(error: Exception) -> str:
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"raised {type(error).__name__}: {first}"


@dataclass(frozen=True)
class _Trial:
    original: Any
    elastic: Any
    call: dict[str, Any]
    grids: tuple[Shape, ...]
    family: Any

    def equal(self) -> None:
        with torch.no_grad():
            difference = (self.run(self.elastic) - self.run(self.original)).abs().max().item()
        if difference:
            raise _Wrong(
                f"outputs differ by up to {difference:.2g}; `tokens`, `joined`, `before`, `output` or `grids` point "
                "at other tokens than the image's"
            )

    def gradients(self) -> None:
        gradients = []
        for model in (self.original, self.elastic):
            model.zero_grad()
            self.run(model).square().sum().backward()
            weights = {name: p.grad for name, p in model.named_parameters() if not name.startswith("elastic.")}
            gradients.append({name: grad for name, grad in weights.items() if grad is not None})
            model.zero_grad()
        for name, grad in gradients[0].items():
            other = gradients[1].get(name)
            if other is None or (grad - other).abs().max() > 1e-5 * max(1.0, grad.abs().max().item()):
                raise _Wrong(f"that of {name} is another, so the interface cuts or changes its way")

    def runs(self) -> None:
        for count in self.budgets:
            with torch.no_grad(), budget(count, doubled=False):
                try:
                    output = self.run(self.elastic)
                except (RuntimeError, IndexError, ValueError, TypeError) as error:
                    raise _Wrong(
                        f"at {count} tokens a window: {str(error).splitlines()[0]}; an argument of the blocks that has "
                        "an entry for each token is missing in `per_token`, or wrong there"
                    ) from error
            if not output.isfinite().all():
                raise _Wrong(f"at {count} tokens a window the output is not finite")

    def error(self) -> None:
        with torch.no_grad():
            right, errors = self.run(self.original), []
            for count in self.budgets:
                with budget(count, doubled=False):
                    errors.append((self.run(self.elastic) - right).square().mean().sqrt().item())
        if errors[-1] == 0:
            raise _Wrong("none at the smallest budget: no token was dropped, or Write takes the tokens before the core")
        if any(low < 0.95 * high for high, low in itertools.pairwise(errors)):
            listed = ", ".join(f"{count}: {error:.3g}" for count, error in zip(self.budgets, errors, strict=True))
            raise _Wrong(
                f"it falls as the budget falls ({listed}); latents may come back to other tokens than they came from, "
                "or the network has branches at zero"
            )

    def positions(self) -> None:
        """With one token a window dropped, the error is larger where carried tokens get the first ones' entries."""
        count, used = self.elastic.budgets[-1] - 1, []

        def shifted(take: Take) -> Take:
            def wrong(value: Any, places: Places) -> Any:
                used.append(take)
                first = torch.arange(places.sequence.shape[-1], device=places.image.device)
                image = torch.arange(len(places.image), device=places.image.device)
                return take(value, Places(image, first.expand_as(places.sequence), places.tokens))

            return wrong

        name = type(self.original).__name__
        others = {argument: shifted(take) for argument, take in self.family.per_token.items()}
        errors = []
        with torch.no_grad(), budget(count, doubled=False):
            right = self.run(self.original)
            for entry in (self.family, dataclasses.replace(self.family, per_token=others)):
                with registered(name, entry):
                    errors.append((self.run(self.elastic) - right).square().mean().sqrt().item())
        if used and errors[1] < 1.002 * errors[0]:
            raise _Wrong(
                f"with {count} tokens a window the error is {errors[0]:.3g}, and {errors[1]:.3g} with the entries of "
                "other tokens: what `per_token` takes may not be the carried tokens'"
            )

    def flops(self) -> None:
        text = self.family.text(self.elastic, self.call)
        full, low = self.budgets[0], self.budgets[len(self.budgets) // 2]
        samples = len(self.call[self.family.sample])
        counted = [
            samples * count_block_flops(self.elastic, tokens=self.grids, text_tokens=text, budget=count)
            for count in (full, low)
        ]
        measured = []
        for count in (full, low):
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, budget(count, doubled=False):
                self.run(self.elastic)
            measured.append(counter.get_total_flops())
        saving, expected = measured[0] - measured[1], counted[0] - counted[1]
        if abs(saving - expected) > 0.02 * saving:
            raise _Wrong(
                f"{low} of {full} tokens save {saving:,}, and `streams` and `attention` say {expected:,}: more than "
                "2% off"
            )

    def saved(self) -> None:
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            for parameter in self.elastic.elastic.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            self.elastic.save_pretrained(folder)
            again = load_elastic(folder)
            with budget(self.budgets[1], doubled=False):
                if not torch.equal(self.run(again), self.run(self.elastic)):
                    raise _Wrong("the loaded transformer gives another output")

    @property
    def budgets(self) -> list[int]:
        """All of a window's tokens, half of them, and so on to one."""
        counts = [self.elastic.budgets[-1]]
        while counts[-1] > 1:
            counts.append(counts[-1] // 2)
        return counts

    def run(self, model: nn.Module) -> Tensor:
        output = model(**self.call, **({"return_dict": False} if hasattr(model, "config") else {}))
        first = output[0] if isinstance(output, tuple) else output
        return torch.stack(first) if isinstance(first, list) else first
