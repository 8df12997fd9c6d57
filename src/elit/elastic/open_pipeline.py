"""Folders of diffusers pipelines with a budget, opened before anything is loaded.

FOLDER of a pipeline with an elastified transformer    written by `pipe.save_pretrained`
FOLDER of an add-on                                    written by `elit distill`; it names its pipeline
"""

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import diffusers
import torch

from elit.elastic.load import is_stock_pipeline, load_elastic
from elit.elastic.storage import RECORD, InterfaceRecord, read_record


@dataclass(frozen=True)
class ElasticPipeline:
    """A pipeline with an elastified transformer, as its folder describes it."""

    folder: Path
    base: str
    """The pipeline's folder or hub name; `folder` itself where it holds everything."""
    record: InterfaceRecord
    kind: Any
    """The pipeline's class."""

    @property
    def budgets(self) -> range:
        return range(1, prod(self.record.window) + 1)

    @property
    def default_scale(self) -> float:
        return default_scale(inspect.signature(self.kind.__call__).parameters)

    def load(self, *, device: torch.device | str, dtype: torch.dtype) -> Any:
        """The pipeline. Raises ValueError where it cannot be loaded."""
        try:
            if self.base == str(self.folder):
                pipe = load_elastic(self.folder, torch_dtype=dtype)
            else:
                pipe = diffusers.DiffusionPipeline.from_pretrained(self.base, torch_dtype=dtype)
                pipe = load_elastic(pipe, self.folder)
        except (OSError, KeyError, ImportError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"cannot load the pipeline of {str(self.folder)!r}: {reason}") from None
        return pipe.to(device)


def open_pipeline(model: str | Path) -> ElasticPipeline | None:
    """The pipeline in a folder, or that of an add-on; None for a folder of anything else.

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
            f"cannot open {str(model)!r}: an add-on that does not name its pipeline; save the pipeline with it after "
            "elit.load_elastic(pipe, folder)"
        )
    try:
        if Path(base).is_dir():
            index = json.loads((Path(base) / "model_index.json").read_text(encoding="utf-8"))
        else:
            index = diffusers.DiffusionPipeline.load_config(base)
        kind = getattr(diffusers, index["_class_name"])
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"cannot find the pipeline {base!r} of {str(model)!r}: {reason}") from None
    return ElasticPipeline(folder, base, record, kind)


def guidance_argument(known: Mapping[str, Any], transformer: Any = None) -> str | None:
    """The argument of a pipeline's call that is the scale of classifier-free guidance; None without.

    known: the arguments of the call.
    """
    if "true_cfg_scale" in known:
        return "true_cfg_scale"
    embedded = transformer is not None and transformer.config.get("guidance_embeds")
    return "guidance_scale" if "guidance_scale" in known and not embedded else None


def default_scale(known: Mapping[str, Any], transformer: Any = None) -> float:
    """The scale of a call that names none; 1 is off, as is a true_cfg_scale without a negative prompt."""
    if guidance_argument(known, transformer) != "guidance_scale":
        return 1.0
    return float(known["guidance_scale"].default or 1.0)
