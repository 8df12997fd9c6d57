"""The speed of this machine for a network, timed and fitted, in MODEL/profile-DEVICE-DTYPE-torchVERSION.json."""

import json
import platform
import random
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from elit._version import __version__
from elit.budgets import evenly_spaced
from elit.costs.timing import timed
from elit.evaluate.chunks import recipe_digest
from elit.files import Json, write_text
from elit.flow.guidance import AG, CCFG, CFG, Guidance
from elit.models.transformer import Transformer
from elit.planner.cost import Costs, anatomy, evaluations_of, fit
from elit.pretrained import measurements_folder
from elit.sampling.sample import sample
from elit.sampling.settings import Sampling

Progress = Callable[[int, int], None]
Case = tuple[Sampling, int]  # a sampling run to be timed: its settings and its number of images
MIN_ROUNDS = 3
HELD_OUT = 12
SCALE = 1.5  # guidance scale of the timed runs, which takes no time


@dataclass(frozen=True)
class Profile:
    recipe: Json  # the network, machine and versions that the times are of; see `profile_recipe`
    cost: Json  # `prices` by term, and whether calls and work are `overlapping`
    rows: list[Json]  # every case with `held_out`, `ms` and `predicted_ms`; held-out ones took no part in the fit
    rounds: int
    anatomy: Json = field(default_factory=dict)  # GFLOPs of an image's forward by part, and the budgets

    def costs(self, anatomy: Json | None = None) -> Costs:
        """The prices in milliseconds. anatomy: where the file is too old to hold it."""
        return Costs.from_prices(anatomy=anatomy or self.anatomy, **self.cost)

    def predict(self, model: Transformer, sampling: Sampling, batch: int = 1) -> float:
        """Milliseconds of a run of `elit.sample`."""
        return self.costs(anatomy(model)).run_ms(evaluations_of(model, sampling), batch)

    def error(self, *, held_out: bool) -> float:
        """Mean relative error over the runs that were, or were not, held out of the fit; 0 where there are none."""
        errors = [abs(row["predicted_ms"] / row["ms"] - 1) for row in self.rows if row["held_out"] == held_out]
        return statistics.mean(errors or [0.0])

    def save(self, folder: Path) -> Path:
        path = profile_path(folder, self.recipe)
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")
        return path


def measure_profile(
    model: Transformer,
    *,
    batch_sizes: Sequence[int] = (1, 2, 4, 8),
    compile: bool = False,
    seconds: float = 60.0,
    progress: Progress | None = None,
) -> Profile:
    """Times runs of `elit.sample` over budgets, batch sizes and guidances for `seconds`, and fits the cost model."""
    known = grid(model.budgets, batch_sizes)
    cases = [*known, *held_out(model.budgets, batch_sizes, known)]
    taken, rounds = time_runs(model, cases, compile=compile, seconds=seconds, progress=progress)
    parts, fitted = anatomy(model), len(known)
    runs = [(evaluations_of(model, sampling), batch) for sampling, batch in cases]
    prices, overlapping = fit(runs[:fitted], taken[:fitted], parts)
    costs = Costs.from_prices(prices, parts, overlapping=overlapping)
    rows = [
        {**case_row(case), "held_out": i >= fitted, "ms": ms, "predicted_ms": costs.run_ms(*run)}
        for i, (case, run, ms) in enumerate(zip(cases, runs, taken, strict=True))
    ]
    recipe = profile_recipe(model, compile=compile)
    return Profile(recipe, {"prices": prices, "overlapping": overlapping}, rows, rounds, parts)


def case_row(case: Case) -> Json:
    """A case as plain values, which `Sampling.from_dict` reads."""
    sampling, batch = case
    guidance = sampling.guidance
    kind, weak = (guidance.kind, guidance.budget) if guidance else ("none", None)
    return {"batch": batch, "steps": sampling.steps, "budget": sampling.budget, "kind": kind, "weak": weak}


def grid(budgets: Sequence[int], batch_sizes: Sequence[int]) -> list[Case]:
    """The runs the cost model is fitted to: five budgets, every batch size, four kinds of branches, 1 step or 3."""
    settings = [
        (batch, num_latents, guidance)
        for batch in sorted(set(batch_sizes))
        for num_latents in evenly_spaced(budgets, 5) or [None]
        for guidance in guidances(budgets, num_latents)
    ]
    return [
        (Sampling(steps=(1, 3)[i % 2], budget=num_latents, guidance=guidance), batch)
        for i, (batch, num_latents, guidance) in enumerate(settings)
    ]


def guidances(budgets: Sequence[int], num_latents: int | None) -> list[Guidance | None]:
    """Beside a main branch of `num_latents` latents, with the weak branch at its least and at half."""
    if num_latents is None:
        return [None, CFG(SCALE)]
    least, half = budgets[0], budgets[(len(budgets) - 1) // 2]
    kinds = [None, CFG(SCALE), CCFG(SCALE, least), CCFG(SCALE, half)]
    return kinds + ([AG(SCALE, least)] if least < num_latents else [])


def held_out(budgets: Sequence[int], batch_sizes: Sequence[int], known: Sequence[Case]) -> list[Case]:
    """Runs at budgets, batch sizes and steps between those of the grid, drawn with a fixed seed."""
    draw = random.Random("held out")
    drawn: list[Case] = []
    while len(drawn) < HELD_OUT:
        num_latents = draw.choice(budgets) if budgets else None
        guidance = draw.choice(guidances(budgets, num_latents))
        batch = draw.randint(min(batch_sizes), max(batch_sizes))
        case = (Sampling(steps=draw.randint(2, 8), budget=num_latents, guidance=guidance), batch)
        if case not in known and case not in drawn:
            drawn.append(case)
    return drawn


def time_runs(
    model: Transformer,
    cases: Sequence[Case],
    *,
    compile: bool = False,
    seconds: float,
    progress: Progress | None = None,
) -> tuple[list[float], int]:
    """Median milliseconds of each case over rounds in changing order, after one that warms up; and their number."""
    conditions = model.conditioning.example(max(batch for _, batch in cases))

    def run(case: Case) -> float:
        sampling, batch = case
        return 1e3 * timed(lambda: sample(model, conditions[:batch], sampling, compile=compile), model.device)[1]

    for case in cases:
        run(case)
    taken: list[list[float]] = [[] for _ in cases]
    order, shuffle, start, rounds = list(range(len(cases))), random.Random(0), time.perf_counter(), 0
    while rounds < MIN_ROUNDS or time.perf_counter() - start < seconds:
        shuffle.shuffle(order)
        for i in order:
            taken[i].append(run(cases[i]))
        rounds += 1
        if progress:
            progress(min(round(time.perf_counter() - start), round(seconds)), round(seconds))
    return [statistics.median(each) for each in taken], rounds


def profile_recipe(model: Transformer, dtype: torch.dtype | None = None, *, compile: bool = False) -> Json:
    """Everything that a run's time depends on, beside its settings."""
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
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def profile_path(folder: Path, recipe: Json) -> Path:
    threads = f"{recipe['threads']}-threads" if recipe["threads"] else ""
    parts = (recipe["device"], threads, recipe["dtype"], "compiled" if recipe["compiled"] else "")
    name = re.sub(r"[^a-z0-9]+", "-", " ".join(filter(None, parts)).lower()).strip("-")
    return measurements_folder(folder) / f"profile-{name}-torch{recipe['torch']}.json"


def read_profile(path: Path, recipe: Json | None = None) -> Profile:
    """The profile in a file. Raises ValueError where it is damaged or, with a recipe, of another machine or network."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        profile = Profile(**content)
        profile.costs(profile.anatomy or dict.fromkeys(("around", "linear", "square"), 1.0))
    except (ValueError, KeyError, TypeError, AttributeError):  # no JSON, no text, or another JSON
        raise ValueError(f"profile={str(path)!r}: damaged; make it again with elit profile") from None
    except OSError as error:
        raise ValueError(f"profile={str(path)!r}: cannot be read ({error.strerror}); elit profile makes one") from None
    for name, value in (recipe or {}).items():
        if profile.recipe.get(name) != value:
            has = "another network" if name == "model" else f"{name} {profile.recipe.get(name)}, here it is {value}"
            raise ValueError(f"profile={str(path)!r}: made for {has}; make it again with elit profile")
    return profile
