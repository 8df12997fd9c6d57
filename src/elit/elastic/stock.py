"""A stock diffusers pipeline whose transformer has a dial, as a service and a page use it: one loader, one call.

FOLDER of a pipeline with an elastified transformer    what `pipe.save_pretrained` writes, or `elit elastify`
FOLDER of an add-on                                    what `elit distill` writes; it names the pipeline that it is for
"""

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image

from elit.arguments import class_numbers
from elit.budgets import Budget, Schedule, parse_budget, resolve_budget, schedule_budgets
from elit.elastic.context import budget as budget_of
from elit.elastic.cost import count_block_flops
from elit.elastic.families import family_of
from elit.elastic.load import is_stock_pipeline, load_elastic
from elit.elastic.recording import first_call
from elit.elastic.stepwise import StepwiseCall
from elit.elastic.storage import RECORD, InterfaceRecord, read_record
from elit.flow.solver import time_grid
from elit.sampling.autoencoders import downsampling
from elit.sampling.settings import SampleSettings

EXAMPLE = "a red boat"


@dataclass(frozen=True)
class StockFolder:
    """What a folder says of its pipeline before anything is loaded."""

    folder: Path
    base: str
    """The pipeline's folder or hub name; `folder` itself where all is in it."""
    record: InterfaceRecord
    kind: Any
    """The pipeline's class."""

    @property
    def budgets(self) -> range:
        return range(1, prod(self.record.window) + 1)

    @property
    def call(self) -> dict[str, inspect.Parameter]:
        """Arguments of the pipeline's call."""
        return dict(inspect.signature(self.kind.__call__).parameters)


def find_stock(model: str | Path) -> StockFolder | None:
    """The stock pipeline in a folder, or for its add-on; None for a folder of anything else.

    Raises ValueError for an add-on that does not name its pipeline, and damaged files.
    """
    if not is_stock_pipeline(model):
        return None
    folder = Path(model)
    if (folder / "model_index.json").is_file():
        record, base = read_record(sorted(folder.glob(f"*/{RECORD}"))[0].parent), str(folder)
    else:
        inside = folder / "transformer"
        record = read_record(inside if (inside / RECORD).is_file() else folder)
        base = record.base or ""
    if not base:
        raise ValueError(
            f"model={str(model)!r}: an add-on that does not name its pipeline; put it in with elit.load_elastic(pipe, "
            "folder), save the pipeline and give its folder"
        )
    kind = getattr(diffusers, name := _class_name(base), None)
    if kind is None:
        raise ValueError(f"model={str(model)!r}: a {name}, which is no pipeline of diffusers")
    return StockFolder(folder, base, record, kind)


def _class_name(base: str) -> str:
    """Of the pipeline in a folder or hub repository. Raises ValueError where there is none."""
    try:
        if Path(base).is_dir():
            index = json.loads((Path(base) / "model_index.json").read_text(encoding="utf-8"))
        else:
            index = diffusers.DiffusionPipeline.load_config(base)
        return str(index["_class_name"])
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(
            f"model: the pipeline {base!r} cannot be found ({reason}); give a folder or hub name"
        ) from None


class StockPipeline:
    """A pipeline that makes pictures from texts or classes, and what its call takes."""

    def __init__(self, pipe: Any, name: str):
        """Raises ValueError for a pipeline that makes no pictures, or not from a text or a class."""
        self.pipe, self.name = pipe, name
        self.known = inspect.signature(type(pipe).__call__).parameters
        kind = type(pipe).__name__
        if not hasattr(getattr(pipe, "transformer", None), "elastic"):
            raise ValueError(f"model={name!r}: the transformer of this {kind} has no dial; elit distill gives it one")
        if "num_frames" in self.known or not {"prompt", "class_labels"} & set(self.known):
            raise ValueError(f"model={name!r}: a {kind} makes no pictures from a text or a class alone")
        pipe.set_progress_bar_config(disable=True)
        self._layouts: dict[tuple[int, int], tuple[Any, int]] = {}

    @classmethod
    def load(cls, stock: StockFolder, *, device: torch.device | str, dtype: torch.dtype) -> "StockPipeline":
        """Raises ValueError for what cannot be loaded."""
        try:
            if stock.base == str(stock.folder):
                pipe = load_elastic(stock.folder, torch_dtype=dtype)
            else:
                pipe = diffusers.DiffusionPipeline.from_pretrained(stock.base, torch_dtype=dtype)
                pipe = load_elastic(pipe, stock.folder)
        except (OSError, KeyError, ImportError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"model={str(stock.folder)!r}: its pipeline cannot be loaded ({reason})") from None
        return cls(pipe.to(device), str(stock.folder))

    @property
    def transformer(self) -> Any:
        return self.pipe.transformer

    @property
    def budgets(self) -> tuple[int, ...]:
        return tuple(self.transformer.budgets)

    @property
    def takes_text(self) -> bool:
        return "class_labels" not in self.known

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, or their numbers; empty for a pipeline that takes text."""
        if self.takes_text:
            return ()
        names = {number: name for name, number in reversed(list((getattr(self.pipe, "labels", None) or {}).items()))}
        return tuple(names.get(number, str(number)) for number in range(self.transformer.config.num_embeds_ada_norm))

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of a picture where nobody asks for another."""
        width, height = (self._factor * (length or 128) for length in self._cells)
        return width, height

    @property
    def has_sizes(self) -> bool:
        """Whether pictures of other sizes can be asked for."""
        return "height" in self.known

    @property
    def multiple(self) -> int:
        """Width and height are multiples of it: two cells of the autoencoder."""
        return 2 * self._factor

    @property
    def guides_by(self) -> str | None:
        """The argument of the call that is the scale of classifier-free guidance; None without."""
        return guiding_argument(self.known, self.transformer)

    @property
    def own_scale(self) -> float:
        """Guidance scale of a call that names none; 1 is off."""
        return own_scale(self.known, self.transformer)

    def call(
        self,
        conditions: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int,
        budget: Schedule = None,
        scale: float | None = None,
        guidance_budget: Budget = None,
        size: tuple[int, int] | None = None,
        negatives: Sequence[str] = (),
        output_type: str = "pil",
    ) -> StepwiseCall:
        """The pipeline's call for one picture a condition (a text, or a class's number), not begun.

        budget: as `elit.budget` takes it. scale: of classifier-free guidance, None = the pipeline's own, 1 = off.
        guidance_budget: of its second branch, None = as the first. size: (width, height), None = the pipeline's own.
        negatives: a negative prompt a condition, where there is guidance.
        Raises ValueError for what this pipeline does not take.
        """
        arguments = self.arguments(conditions, steps=steps, scale=scale, size=size, negatives=negatives)
        arguments["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
        if len(seeds) == 1:
            (arguments["generator"],) = arguments["generator"]
        guided: dict[str, Any] = {} if guidance_budget is None else {"guidance": guidance_budget}
        return StepwiseCall(self.pipe, arguments | {"output_type": output_type}, budget_of(budget, **guided))

    def arguments(
        self,
        conditions: Sequence[str],
        *,
        steps: int,
        scale: float | None = None,
        size: tuple[int, int] | None = None,
        negatives: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Of the call, without seeds and kind of output. Raises ValueError."""
        if self.takes_text:
            arguments: dict[str, Any] = {"prompt": list(conditions)}
        else:
            arguments = {"class_labels": self.class_numbers(conditions)}
        scale = self.own_scale if scale is None else scale
        if self.guides_by is None and scale != 1:
            raise ValueError(f"guidance_scale={scale:g}: {type(self.pipe).__name__} has no classifier-free guidance")
        if self.guides_by is not None:
            arguments[self.guides_by] = scale
        if scale > 1 and "negative_prompt" in self.known:
            # Where the scale is called true_cfg_scale, a call without a negative prompt leaves guidance out.
            arguments["negative_prompt"] = [text or " " for text in negatives or [""] * len(conditions)]
        if size is not None and size != self.size:
            self.check_size(size)
        if self.has_sizes:
            arguments["width"], arguments["height"] = size or self.size
        return arguments | {"num_inference_steps": steps}

    def class_numbers(self, names: Sequence[str]) -> list[int]:
        """Raises ValueError for a class that there is not."""
        labels: dict[str, int] = getattr(self.pipe, "labels", None) or {}
        count = len(self.classes)
        numbers = [labels[name] if name in labels else class_numbers([name], self.classes, count)[0] for name in names]
        if wrong := [number for number in numbers if not 0 <= number < count]:
            raise ValueError(f"labels={wrong[0]}: classes are 0 to {count - 1}")
        return numbers

    def check_size(self, size: tuple[int, int]) -> None:
        """Raises ValueError for a size that the pipeline has not."""
        if not self.has_sizes:
            raise ValueError(
                f"size={size[0]}x{size[1]}: {type(self.pipe).__name__} makes {self.size[0]}x{self.size[1]}"
            )
        for name, pixels in zip(("width", "height"), size, strict=True):
            if pixels < self.multiple or pixels % self.multiple:
                raise ValueError(f"{name}={pixels}: give a multiple of {self.multiple}")

    def flops(self, *, budget: int | None = None, size: tuple[int, int] | None = None) -> int:
        """Of one branch of one step of one picture, by the closed form: blocks, Read and Write.

        With a text as long as an example's. Raises ValueError.
        """
        size = size or self.size
        if size not in self._layouts:
            example = EXAMPLE if self.takes_text else self.classes[0]
            request = self.arguments([example], steps=1, scale=1.0 if self.guides_by else None, size=size)
            call = first_call(self.pipe, request | {"generator": torch.Generator().manual_seed(0)})
            grids = family_of(self.transformer).grids(self.transformer, call)
            text = call.get("encoder_hidden_states")
            length = 0 if text is None or not hasattr(text, "shape") else text.shape[1]
            self._layouts[size] = grids, length
        grids, length = self._layouts[size]
        return count_block_flops(self.transformer, tokens=grids, text_tokens=length, budget=budget)

    # From settings as `elit sample` has them

    def picture(
        self, settings: SampleSettings, number: int = 0, on_step: Callable[[int, int], None] | None = None
    ) -> Image.Image:
        """Picture `number` of `settings`, by a call of its own: it does not depend on the others.

        on_step: called behind every step with the steps taken and all steps; what it raises ends the call.
        Raises ValueError for settings that this pipeline does not take.
        """
        conditions = self.conditions(settings)
        arguments = self._call_arguments(settings)
        call = self.call([conditions[number % len(conditions)]], [settings.seed + number], **arguments)
        try:
            while call.advance():
                if on_step:
                    on_step(call.steps, call.total)
        finally:
            call.give_up()  # a step that raised leaves the call waiting; one that is over is not concerned
        picture: Image.Image = call.output.images[0]
        return picture

    def conditions(self, settings: SampleSettings) -> tuple[str, ...]:
        """Texts or classes of `settings`. Raises ValueError for those of the other kind, and unknown classes."""
        given, other = settings.prompts, settings.labels
        if not self.takes_text:
            given, other = other, given
        takes = "text; give prompts" if self.takes_text else "classes; give labels"
        if other or not given:
            raise ValueError(f"{other[0] if other else 'no condition'}: this pipeline takes {takes}")
        if settings.text_encoder is not None:
            raise ValueError(f"text_encoder={settings.text_encoder!r}: this pipeline has its own")
        if not self.takes_text:
            self.class_numbers(given)
        return given

    def gflops(self, settings: SampleSettings) -> float:
        """Of one picture: the transformer's blocks, Read and Write; a schedule as with even steps."""
        arguments = self._call_arguments(settings)
        times = time_grid(settings.steps)[:-1]
        listed = arguments["budget"]
        counts = listed if isinstance(listed, list) else schedule_budgets(listed, times, self.budgets)
        main = [self.flops(budget=resolve_budget(count, self.budgets)) for count in counts]
        if settings.guidance == "none" or not settings.scale > 1:
            return sum(main) / 1e9
        weak = arguments["guidance_budget"]
        second = main if weak is None else [self.flops(budget=resolve_budget(weak, self.budgets))] * len(main)
        return (sum(main) + sum(second)) / 1e9

    def _call_arguments(self, settings: SampleSettings) -> dict[str, Any]:
        """Arguments of `call`. Raises ValueError."""
        own = SampleSettings()
        for name in ("solver", "shift", "cache", "guidance_interval", "sample_budgets"):
            if (value := getattr(settings, name)) != getattr(own, name):
                raise ValueError(f"{name}={value}: a pipeline of diffusers has its own way; leave it out")
        if settings.guidance == "ag" or (settings.guidance != "none" and self.guides_by is None):
            has = "none, cfg and ccfg" if self.guides_by else "no guidance of its own"
            raise ValueError(f"guidance={settings.guidance}: {type(self.pipe).__name__} has {has}")
        if settings.step_budgets and len(settings.step_budgets) != settings.steps:
            raise ValueError(f"step_budgets: {len(settings.step_budgets)} of them for {settings.steps} steps")
        plain = settings.arguments()
        guided = settings.guidance != "none"
        return {
            "steps": settings.steps,
            "budget": plain["budget"] if plain["step_budgets"] is None else plain["step_budgets"],
            "scale": settings.scale if guided else 1.0,
            "guidance_budget": parse_budget(settings.guidance_budget) if settings.guidance == "ccfg" else None,
        }

    @property
    def _factor(self) -> int:
        """Pixels of an autoencoder's cell."""
        return int(getattr(self.pipe, "vae_scale_factor", 0) or downsampling(self.pipe.vae))

    @property
    def _cells(self) -> tuple[int, int]:
        """The autoencoder's cells of a picture across and down."""
        cells = getattr(self.pipe, "default_sample_size", None) or self.transformer.config.get("sample_size") or 128
        return (cells, cells)


def guiding_argument(known: Any, transformer: Any) -> str | None:
    """See `StockPipeline.guides_by`. known: arguments of a pipeline's call."""
    if "true_cfg_scale" in known:
        return "true_cfg_scale"
    embedded = transformer is not None and transformer.config.get("guidance_embeds")
    return "guidance_scale" if "guidance_scale" in known and not embedded else None


def own_scale(known: Any, transformer: Any = None) -> float:
    """See `StockPipeline.own_scale`. A true_cfg_scale counts for nothing without a negative prompt."""
    if guiding_argument(known, transformer) != "guidance_scale":
        return 1.0
    return float(known["guidance_scale"].default or 1.0)
