"""load_elastic: a saved elastified transformer, or a pipeline that has one."""

import json
from pathlib import Path
from typing import Any

import diffusers
import torch

from elit.elastic.add_on import fetch, load_weights
from elit.elastic.families import CLASSES
from elit.elastic.low_rank import add_low_rank
from elit.elastic.storage import RECORD, VARIANT, InterfaceRecord, read_record
from elit.elastic.surgery import elastify
from elit.files import existing
from elit.models.networks import NETWORKS
from elit.models.saved import check_weights, saved_dtype


def load_elastic(pipe_or_folder: Any, name: str | Path | None = None, **kwargs: Any) -> Any:
    """Gives a stock pipeline the add-on that `elit distill` wrote, or loads what `save_pretrained` wrote.

    load_elastic(pipe, name): puts the add-on in the folder or hub repository `name` into the pipeline's transformer, in
    place, and returns the pipeline. Its own weights stay as they are, quantised ones too.
    load_elastic(folder): an elastified transformer, or the pipeline around it; kwargs: as in diffusers'
    from_pretrained, `torch_dtype` for one.

    Raises ValueError where the folder holds nothing elastified, or what it holds is damaged or for another class.
    """
    if name is not None:
        return put_into(pipe_or_folder, str(existing(name, "name")))
    if not isinstance(pipe_or_folder, str | Path):
        raise ValueError(f"name: not given; elit.load_elastic(pipe, name) for a {type(pipe_or_folder).__name__}")
    folder = existing(pipe_or_folder, "folder")
    if not (folder / "model_index.json").is_file():
        return load_transformer(folder, **kwargs)
    parts = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    of_models = {name: value for name, value in kwargs.items() if name not in parts}
    elastic = {
        path.parent.name: load_transformer(path.parent, **of_models) for path in sorted(folder.glob(f"*/{RECORD}"))
    }
    if not elastic:
        raise ValueError(
            f"folder={str(folder)!r}: none of this pipeline's parts has an {RECORD}; load it with diffusers"
        )
    return diffusers.DiffusionPipeline.from_pretrained(folder, **elastic, **kwargs)


def put_into(pipe: Any, name: str) -> Any:
    """Gives the transformer of `pipe`, in place, the add-on in the folder or hub repository `name`; returns it.

    Weights of the pipeline stay as they are, quantised ones too. Raises ValueError where there is no add-on, it is
    damaged or made for another class.
    """
    folder = fetch(name)
    transformer = getattr(pipe, "transformer", None)
    if transformer is None:
        raise ValueError(f"pipe: a {type(pipe).__name__} has no transformer")
    if not (folder / RECORD).is_file() and (folder / "transformer" / RECORD).is_file():
        pipe.transformer = load_transformer(folder / "transformer", torch_dtype=transformer.dtype).to(
            transformer.device
        )
        return pipe
    record = read_record(folder)
    if record.kind != type(transformer).__name__:
        raise ValueError(f"name={name!r}: is for a {record.kind}, the pipeline has a {type(transformer).__name__}")
    if record.changed:
        raise ValueError(
            f"name={name!r}: belongs to weights of its own; load that folder with elit.load_elastic(folder)"
        )
    _restore(transformer, record, folder)
    return pipe


def load_transformer(folder: Path, **kwargs: Any) -> Any:
    """The elastified transformer in `folder`; see `load_elastic`."""
    record = read_record(folder)
    check_weights(folder, "folder")
    kind = NETWORKS.get(record.kind) or CLASSES.get(record.kind) or getattr(diffusers, record.kind)
    kwargs = {"torch_dtype": saved_dtype(folder)} | {name: value for name, value in kwargs.items() if value is not None}
    variant = {"variant": VARIANT} if record.changed else {}
    transformer, loading = kind.from_pretrained(folder, output_loading_info=True, **kwargs | variant)
    if wrong := sorted([*loading["missing_keys"], *loading["unexpected_keys"]]):
        raise ValueError(f"folder={str(folder)!r}: its weights do not fit its config.json, {wrong[0]} for one")
    _align(transformer)
    _restore(transformer, record, folder)
    return transformer.eval()


def _align(transformer: torch.nn.Module) -> None:
    """Weights that lie in a mapped file where no allocator puts them take other kernels, and the last bit differs."""
    for weight in transformer.parameters():
        if weight.device.type == "cpu" and weight.data_ptr() % 64:
            weight.data = weight.data.clone()


def _restore(transformer: Any, record: InterfaceRecord, folder: Path) -> None:
    """Interface and low-rank changes as `record` says, with the weights in `folder`."""
    settings = {name: getattr(record, name) for name in ("read_after", "write_after", "window", "mode")}
    elastify(transformer, **settings)
    if record.lora_rank:
        add_low_rank(transformer, record.lora_rank)
    transformer.elastic_record = record
    load_weights(transformer, folder)
