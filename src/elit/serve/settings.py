"""The settings of a service: the options of `elit serve`, which go to replicas and into a Serve config as they are."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

from elit.budgets import evenly_spaced, resolve_budget
from elit.config import require, require_counts
from elit.files import Json
from elit.flow.guidance import CCFG, CFG, Guidance
from elit.sampling.settings import STEPS, Sampling

KEY_VARIABLE = "ELIT_API_KEY"
CLUSTER_VARIABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""0 where Ray is on this machine alone, as it is on those systems: its own processes listen on loopback then."""
Rung = tuple[int, int | None]  # Steps, and latents per window; None for a network without a latent interface.


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """Serve images over OpenAI's API with a budget that follows the load: every request gets the most compute that all
    deadlines allow. Ray Serve, on this machine or on a cluster. Needs the extra serve.

    Example: elit serve runs/quickstart/model --deadline-ms 2000
    """

    model: Annotated[Path, tyro.conf.Positional]
    """Folder of a saved model or ElitPipeline, of a diffusers pipeline whose transformer has a dial, or of an add-on of
    elit distill; or fashion, the model in the package."""
    host: str = "127.0.0.1"  # Address to listen at; any but this machine's own needs a key.
    port: int = 8000  # 0 = any free one.
    name: str = ""  # Name of the model for clients; default: the folder's.
    steps: int | None = None
    """Solver steps at full quality; default: the ladder of settings is from the table of elit sweep beside the model
    (sweep.jsonl), and has 40 steps where there is none."""
    least_steps: int | None = None  # The fewest steps, where even the least budget is too slow; default: half.
    least_budget: str = ""  # The floor: 8 latents per window, or a share such as 25%; default: the model's least.
    rungs: Annotated[tuple[Rung, ...], tyro.conf.Suppress] = ()  # The ladder from least to full; () = from `steps`.
    guidance_scale: float | None = None  # For requests without one; 1 is off; default: off, or the pipeline's.
    guidance_budget: str = ""  # Budget of the second branch (CCFG); default: as the first (CFG).
    deadline_ms: float = 5000.0  # For requests without one.
    size: str = ""  # WIDTHxHEIGHT of a pipeline's pictures where a request has none; default: the pipeline's own.
    max_batch: int = 0  # Images in progress at a time in a replica; default: as many as raise the rate, at most 8.
    max_queue: int = 64  # Images waiting at a replica; more are refused.
    most_images: int = 10  # Images of one request.
    most_steps: int = 100  # Steps of one request.
    replicas: int = 1  # Copies of the model.
    min_replicas: int = 0  # Autoscaling, with --max-replicas.
    max_replicas: int = 0  # Autoscaling between --min-replicas and this; 0 = off.
    cpus: float = 1.0  # Cores that Ray books for a replica.
    gpus: float | None = None  # GPUs of a replica; default: 1 on a GPU, else 0. 0.5 puts two on one.
    threads: int | None = None  # Threads of a replica on a CPU; default: those of elit sample, over --replicas.
    device: str | None = None  # Such as cuda or cpu; default: cuda where there is one.
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # Dtype of the network.
    compile: bool = False  # Compile the network first.
    exact: bool | None = None  # Every image alone in its forward: bytes do not depend on the load; default: on a CPU.
    profile: Path | None = None  # File of elit profile; default: the one beside the model, or measured at the start.
    strict: bool = False  # Refuse parameters that have no meaning here, which are ignored else, with a note.
    drain_seconds: float = 30.0  # After SIGTERM, for unanswered requests.
    start_seconds: float = 60.0  # For Ray to start, and for Ray Serve; else the service has failed.
    address: str | None = None  # A Ray cluster, such as auto or ray://head:10001; default: this machine alone.
    needs_key: Annotated[bool, tyro.conf.Suppress] = False  # Replicas must find a key in ELIT_API_KEY.

    def __post_init__(self) -> None:
        full = self.steps or STEPS
        counts = ("steps", "least_steps", "max_queue", "most_images", "most_steps", "threads", "replicas")
        require_counts(self, *counts)
        require_counts(self, "max_batch", "min_replicas", "max_replicas", least=0)
        limit = f"0 to max_replicas={self.max_replicas}"
        require(self.min_replicas <= self.max_replicas, "min_replicas", self.min_replicas, limit)
        require(0 <= self.port < 65536, "port", self.port, "0 to 65535")
        require(0 < self.deadline_ms < math.inf, "deadline_ms", self.deadline_ms, "milliseconds above 0")
        require(full <= self.most_steps, "steps", full, f"at most most_steps={self.most_steps}")
        object.__setattr__(self, "model", Path(self.model))
        object.__setattr__(self, "profile", Path(self.profile) if self.profile else None)
        object.__setattr__(self, "rungs", tuple((steps, budget) for steps, budget in self.rungs))
        if self.size:
            parse_size(self.size)

    def options(self) -> Json:
        """The settings that are no defaults, as YAML has them, but the address: a Serve config has that elsewhere."""
        default = ServiceSettings(model=Path())
        names = [each.name for each in fields(ServiceSettings) if each.name not in ("host", "port", "address")]
        changed = {name: value for name in names if (value := getattr(self, name)) != getattr(default, name)}
        return {name: str(value) if isinstance(value, Path) else value for name, value in changed.items()}

    def ladder(self, budgets: Sequence[int], default_scale: float = 1.0) -> tuple[Sampling, ...]:
        """The service's settings, from the floor to full, with its own guidance. default_scale: the model's."""
        rungs = self.rungs
        if not rungs:
            full = self.steps or STEPS
            fewest = self.least_steps or (full + 1) // 2
            require(fewest <= full, "least_steps", fewest, f"1 to {full}")
            least = resolve_budget(self.least_budget, budgets) if self.least_budget else None
            spaced = evenly_spaced([count for count in budgets if count >= (least or 0)], 8) or [None]
            fewer = [(steps, spaced[0]) for steps in evenly_spaced(range(fewest, full), 4)]
            rungs = (*fewer, *((full, count) for count in spaced))
        guidance = self.guidance(budgets, default_scale)
        return tuple(
            Sampling(steps=steps, budget=resolve_budget(count, budgets), guidance=guidance) for steps, count in rungs
        )

    def guidance(
        self, budgets: Sequence[int], default: float, scale: float | None = None, weak: int | float | str | None = None
    ) -> Guidance | None:
        """Guidance of `scale`, its second branch at `weak`; else the service's, or the scale `default`."""
        scale = next(each for each in (scale, self.guidance_scale, default) if each is not None)
        weak = self.guidance_budget if weak is None else weak
        if scale == 1:
            return None
        return CFG(scale) if weak == "" else CCFG(scale, resolve_budget(weak, budgets))


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of such as 1024x768. Raises ValueError."""
    match = re.fullmatch(r"([1-9]\d{0,5})x([1-9]\d{0,5})", text, re.ASCII)
    if match is None:
        raise ValueError(f"size must be WIDTHxHEIGHT in pixels, such as 1024x768, got {text[:32]!r}")
    return int(match[1]), int(match[2])
