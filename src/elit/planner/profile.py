"""What this machine takes for a network: sampling runs timed in rounds, and the cost model fitted to them.

MODEL/profile-DEVICE-DTYPE-torchVERSION.json    recipe, prices, every run measured; `elit.plan` finds it there
"""

import json
import platform
import random
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from elit._version import __version__
from elit.costs.timing import timed
from elit.evaluate.recipe import recipe_digest
from elit.files import write_text
from elit.flow.guidance import make_guidance
from elit.models.transformer import Transformer
from elit.planner.cost import CostModel, CostPolynomial, Counts, fit
from elit.pretrained import measurements_folder
from elit.sampling.sample import sample

Progress = Callable[[int, int], None]
LEAST_ROUNDS = 3
HELD_OUT = 12


@dataclass(frozen=True, kw_only=True)
class Case:
    """A sampling run to be timed."""

    batch: int
    steps: int
    budget: int | None
    kind: str = "none"
    """Of guidance: none, cfg, ag or ccfg."""
    weak: int | None = None
    """Latents of the second branch of ag and ccfg."""

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of `elit.sample`; the scale of guidance takes no time."""
        return {"steps": self.steps, "budget": self.budget, "guidance": make_guidance(self.kind, 1.5, self.weak)}


@dataclass(frozen=True)
class Profile:
    """Measured runs of one network on one machine, and the cost model of them."""

    recipe: dict[str, Any]
    """What the times are of; see `profile_recipe`."""
    cost: CostModel
    rows: list[dict[str, Any]]
    """Every case with `held_out`, `ms` and `predicted_ms`; held-out ones took no part in the fit."""
    rounds: int
    anatomy: dict[str, Any] = field(default_factory=dict)
    """GFLOPs of a forward of one image by part (`CostPolynomial`), and the budgets: what a cost needs beside prices."""

    def error(self, *, held_out: bool) -> float:
        """Mean relative error over the runs that were, or were not, held out of the fit."""
        rows = [row for row in self.rows if row["held_out"] == held_out]
        return statistics.mean(abs(row["predicted_ms"] / row["ms"] - 1) for row in rows)

    @property
    def margin(self) -> float:
        """What plans leave room for: the mean error over held-out runs, 0 where none was held out."""
        return self.error(held_out=True) if any(row["held_out"] for row in self.rows) else 0.0

    def save(self, folder: Path) -> Path:
        path = profile_path(folder, self.recipe)
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")
        return path


def measure_profile(
    model: Transformer,
    *,
    batch_sizes: Sequence[int] = (1, 2, 4, 8),
    dtype: torch.dtype | None = None,
    compile: bool = False,
    seconds: float = 60.0,
    progress: Progress | None = None,
) -> Profile:
    """Times runs of `elit.sample` over budgets, batch sizes and guidances, and fits the cost model.

    seconds: how long to go on; there are three rounds at the least. progress: (seconds gone, seconds in all).
    Every round goes through all runs in another order, and a run's time is its median: what else the machine does
    hits all of them alike. Raises ValueError for a batch size that is none.
    """
    if not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"batch_sizes={tuple(batch_sizes)}: give numbers of images, at least 1 each")
    known = grid(model.budgets, batch_sizes)
    unknown = held_out(model.budgets, batch_sizes, known)
    cases = [*known, *unknown]
    taken, rounds = time_runs(model, cases, dtype=dtype, compile=compile, seconds=seconds, progress=progress)
    polynomial = CostPolynomial(model)
    runs = [counts_of(polynomial, case) for case in cases]
    cost = fit(runs[: len(known)], taken[: len(known)])
    rows = [
        {**asdict(case), "held_out": i >= len(known), "ms": ms, "predicted_ms": cost.ms(run)}
        for i, (case, run, ms) in enumerate(zip(cases, runs, taken, strict=True))
    ]
    return Profile(profile_recipe(model, dtype, compile=compile), cost, rows, rounds, polynomial.parts())


def counts_of(polynomial: CostPolynomial, case: Case) -> Counts:
    return polynomial.counts(batch=case.batch, **case.settings)


def grid(budgets: Sequence[int], batch_sizes: Sequence[int]) -> list[Case]:
    """The runs the cost model is fitted to: five budgets, every batch size, four kinds of branches, 1 step or 3."""
    cases = []
    for batch in sorted(set(batch_sizes)):
        for num_latents in spread(budgets, 5):
            for kind, weak in branch_kinds(budgets, num_latents):
                cases += [(batch, num_latents, kind, weak)]
    return [
        Case(batch=batch, steps=(1, 3)[i % 2], budget=num_latents, kind=kind, weak=weak)
        for i, (batch, num_latents, kind, weak) in enumerate(cases)
    ]


def branch_kinds(budgets: Sequence[int], num_latents: int | None) -> list[tuple[str, int | None]]:
    """Guidances beside a main branch of `num_latents` latents, with the second branch at its least and at half."""
    if not budgets or num_latents is None:
        return [("none", None), ("cfg", None)]
    least, half = budgets[0], budgets[(len(budgets) - 1) // 2]
    kinds: list[tuple[str, int | None]] = [("none", None), ("cfg", None), ("ccfg", least), ("ccfg", half)]
    return kinds + ([("ag", least)] if least < num_latents else [])


def spread(budgets: Sequence[int], count: int) -> list[int | None]:
    """`count` of the budgets, the least and the most among them; a baseline has the one."""
    if not budgets:
        return [None]
    places = {round(i * (len(budgets) - 1) / (count - 1)) for i in range(count)}
    return [budgets[place] for place in sorted(places)]


def held_out(budgets: Sequence[int], batch_sizes: Sequence[int], known: Sequence[Case]) -> list[Case]:
    """Runs at budgets, batch sizes and steps between those of the grid, drawn with a fixed seed."""
    draw = random.Random("held out")
    drawn: list[Case] = []
    while len(drawn) < HELD_OUT:
        num_latents = draw.choice(budgets) if budgets else None
        kind, weak = draw.choice(branch_kinds(budgets, num_latents))
        if weak is not None:
            weak = draw.choice(
                [count for count in budgets if kind == "ccfg" or num_latents is None or count < num_latents]
            )
        batch = draw.randint(min(batch_sizes), max(batch_sizes))
        case = Case(batch=batch, steps=draw.randint(2, 8), budget=num_latents, kind=kind, weak=weak)
        if case not in known and case not in drawn:
            drawn.append(case)
    return drawn


def time_runs(
    model: Transformer,
    cases: Sequence[Case],
    *,
    dtype: torch.dtype | None = None,
    compile: bool = False,
    seconds: float,
    progress: Progress | None = None,
) -> tuple[list[float], int]:
    """Median milliseconds of each case, and over how many rounds; the first round warms up and does not count."""
    conditions = model.example_condition(max(case.batch for case in cases))

    def run(case: Case) -> float:
        _, seconds = timed(
            lambda: sample(model, conditions[: case.batch], dtype=dtype, compile=compile, **case.settings), model.device
        )
        return 1e3 * seconds

    for case in cases:
        run(case)
    taken: list[list[float]] = [[] for _ in cases]
    order, shuffle, start, rounds = list(range(len(cases))), random.Random(0), time.perf_counter(), 0
    while rounds < LEAST_ROUNDS or time.perf_counter() - start < seconds:
        shuffle.shuffle(order)
        for i in order:
            taken[i].append(run(cases[i]))
        rounds += 1
        if progress:
            progress(min(round(time.perf_counter() - start), round(seconds)), round(seconds))
    return [statistics.median(each) for each in taken], rounds


def profile_recipe(model: Transformer, dtype: torch.dtype | None = None, *, compile: bool = False) -> dict[str, Any]:
    """All that a run's time depends on, beside its settings: machine, versions, and the network's shape."""
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    return {
        "device": machine(model.device),
        "threads": torch.get_num_threads() if model.device.type == "cpu" else None,
        "dtype": str(dtype or model.dtype).removeprefix("torch."),
        "compiled": compile,
        "torch": torch.__version__,
        "elit": __version__,
        "model": recipe_digest({"class": type(model).__name__, "config": config}),
    }


def machine(device: torch.device) -> str:
    """The name of a GPU or of a processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def profile_path(folder: Path, recipe: dict[str, Any]) -> Path:
    threads = f"{recipe['threads']}-threads" if recipe["threads"] else ""
    parts = (recipe["device"], threads, recipe["dtype"], "compiled" if recipe["compiled"] else "")
    name = re.sub(r"[^a-z0-9]+", "-", " ".join(filter(None, parts)).lower()).strip("-")
    return measurements_folder(folder) / f"profile-{name}-torch{recipe['torch']}.json"


def read_profile(path: Path, recipe: dict[str, Any]) -> Profile:
    """The profile in a file. Raises ValueError where it is damaged, or of another machine, version or network."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        cost, anatomy = CostModel(**content["cost"]), content.get("anatomy", {})
        profile = Profile(content["recipe"], cost, content["rows"], content["rounds"], anatomy)
    except (ValueError, KeyError, TypeError):  # no JSON, no text, or another JSON
        raise ValueError(f"profile={str(path)!r}: damaged; make it again with elit profile") from None
    except OSError as error:
        raise ValueError(f"profile={str(path)!r}: cannot be read ({error.strerror}); elit profile makes one") from None
    for name, value in recipe.items():
        if profile.recipe.get(name) != value:
            has = "another network" if name == "model" else f"{name} {profile.recipe.get(name)}, here it is {value}"
            raise ValueError(f"profile={str(path)!r}: made for {has}; make it again with elit profile")
    return profile
