"""Loading of networks, elastified transformers and pipelines; add-ons are two files, or FOLDER/transformer/."""

import functools
import inspect
import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor

from elit import compat
from elit.elastic.context import UNSET, budget as budget_of
from elit.elastic.families import CLASSES
from elit.elastic.families.family import Model, Pipeline
from elit.elastic.interface import add_low_rank
from elit.elastic.pipelines import check_transformer, one_line
from elit.elastic.record import RECORD, WEIGHTS, InterfaceRecord, read_record, settings_of, write_interface
from elit.elastic.surgery import VARIANT, Elastic, elastify, rebuild, unload_elastic
from elit.models.saved import known_networks, load_own, load_whole, saved_dtype, subclasses
from elit.models.transformer import Transformer
from elit.pretrained import model_folder
from elit.sampling.autoencoders import load_autoencoder


def load_model(folder: str | Path, **kwargs: Any) -> Model:
    """The network saved in `folder`: one of this library, or an elastified transformer; of a saved pipeline its own.

    "fashion" is the model that comes with the package, unless there is a folder of that name here.
    A checkpoint of a training run gives its averaged weights, however many processes it was sharded over.
    kwargs: as in diffusers' from_pretrained; `torch_dtype` is by default the dtype that was saved. Raises ValueError
    where the folder is missing, half-written or of another library.
    """
    folder = model_folder(folder)
    inner = folder / "transformer" if (folder / "model_index.json").is_file() else folder
    return load_transformer(inner, **kwargs) if (inner / RECORD).is_file() else load_own(folder, **kwargs)


def load_elastic(pipe_or_folder: Any, name: str | Path | None = None, **kwargs: Any) -> Any:
    """Gives a stock pipeline the add-on that `elit distill` wrote, or loads what `save_pretrained` wrote.

    load_elastic(pipe, name): puts the add-on in the folder or hub repository `name` into the pipeline's transformer, in
    place of a dial that it has, and returns the pipeline. Its own weights stay as they are, quantised ones too;
    `elit.unload_elastic(pipe)` takes the dial off again.
    load_elastic(folder): an elastified transformer, or the pipeline around it; kwargs: as in diffusers'
    from_pretrained, `torch_dtype` for one.

    Raises ValueError where the folder holds nothing elastified, or what it holds is damaged or for another class.
    """
    if name is not None:
        return _put_into(pipe_or_folder, str(name))
    folder = Path(pipe_or_folder)
    if not (folder / "model_index.json").is_file():
        return load_transformer(folder, **kwargs)
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    if not (parts := sorted(path.parent.name for path in folder.glob(f"*/{RECORD}"))):
        raise ValueError(f"cannot load {str(folder)!r}: none of its parts has an {RECORD}; load it with diffusers")
    of_models = {name: value for name, value in kwargs.items() if name not in index}
    elastic = {
        part: load_transformer(folder / part, **_of_part(part, of_models)) for part in parts if part not in kwargs
    }
    # The base class drops parts whose default is None, Wan's transformers for one; so would a custom class.
    kind = getattr(diffusers, str(index["_class_name"]), diffusers.DiffusionPipeline)
    pipe = kind.from_pretrained(folder, **elastic, **kwargs)
    pipe.__class__ = with_dial(type(pipe))
    pipe.register_modules(**elastic)
    return pipe


def _of_part(part: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """A pipeline's options of loading as its part `part` has them: dtypes and quantisation may be by part."""
    options = dict(options)
    dtype = options.pop("dtype", None) or options.pop("torch_dtype", None)
    options["torch_dtype"] = dtype.get(part, dtype.get("default", torch.float32)) if isinstance(dtype, dict) else dtype
    if isinstance(config := options.get("quantization_config"), diffusers.PipelineQuantizationConfig):
        options["quantization_config"] = compat.quantization_of(config, part)
    return options


def _put_into(pipe: Pipeline, name: str) -> Pipeline:
    check_transformer(pipe)
    pipe.__class__ = with_dial(type(pipe))
    if (whole := put_add_on(pipe.transformer, name)) is not None:
        dial = load_transformer(whole, torch_dtype=compat.compute_dtype(pipe.transformer))
        pipe.transformer = dial.to(pipe.transformer.device)
    return pipe


def put_add_on(transformer: Model, name: str) -> Path | None:
    """Puts the add-on `name` into a transformer; returns the folder, and does nothing, where it is one of all weights.
    Raises ValueError where it does not fit."""
    folder = Path(name)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(name, allow_patterns=[RECORD, WEIGHTS, "transformer/*"]))
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot find {name!r} as a folder or on the hub: {one_line(error)}") from None
    whole = not (folder / RECORD).is_file() and (folder / "transformer" / RECORD).is_file()
    record, kind = read_record(folder / "transformer" if whole else folder), type(transformer).__name__
    if record.kind not in {each.__name__ for each in type(transformer).__mro__}:
        raise ValueError(f"cannot put {name!r} into a {kind}: it is for a {record.kind}")
    own, wanted = settings_of(transformer), record.config or {}
    for setting in wanted.keys() & own.keys():
        if own[setting] != wanted[setting]:
            other = f"{setting}={wanted[setting]}, not {own[setting]}"
            raise ValueError(f"cannot put {name!r} into this {kind}: it is for one with {other}")
    if whole:
        return folder / "transformer"
    if record.changed:
        raise ValueError(f"cannot put {name!r} into a pipeline: it has weights of its own; elit.load_elastic(folder)")
    if isinstance(transformer, Elastic):  # another dial takes its place
        unload_elastic(transformer)
    try:
        _restore(transformer, record, folder)
    except ValueError:
        if isinstance(transformer, Elastic):
            unload_elastic(transformer)
        raise
    return None


@functools.cache
def with_dial(kind: Pipeline) -> Pipeline:
    """The class of a pipeline whose call takes `budget` and `guidance_budget`, as `elit.budget` does."""
    if hasattr(kind, "dial"):
        return kind

    @functools.wraps(kind.__init__)
    def init(self: Pipeline, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, *args, **kwargs)
        for part in self.components.values():
            folder = Path(getattr(getattr(part, "config", None), "_name_or_path", ""))
            if (folder / RECORD).is_file() and not hasattr(part, "elastic"):
                _restore(part, read_record(folder), folder)

    @functools.wraps(kind.__call__)
    def call(self: Pipeline, *args: Any, **kwargs: Any) -> Any:
        value, weak = (kwargs.pop(name, UNSET) for name in ours)
        if value is UNSET and weak is UNSET:
            return kind.__call__(self, *args, **kwargs)
        with budget_of(None if value is UNSET else value, guidance=weak):
            return kind.__call__(self, *args, **kwargs)

    ours, known = ("budget", "guidance_budget"), inspect.signature(kind.__call__)
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in ours]
    parameters = sorted([*known.parameters.values(), *more], key=lambda each: each.kind)
    vars(call)["__signature__"] = known.replace(parameters=parameters)
    reduce = lambda self: (rebuild, (with_dial, kind), self.__dict__)  # noqa: E731
    return type(kind.__name__, (kind,), {"__init__": init, "__call__": call, "__reduce__": reduce, "dial": True})


def save_add_on(transformer: Model, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Writes what was trained into `folder`. weights: by name, whole, on the CPU; all or those of `elastic` alone."""
    if any(not name.startswith("elastic.") for name in weights):
        transformer.load_state_dict(dict(weights), strict=False)
        transformer.save_pretrained(folder / "transformer")
        return
    own = {name.removeprefix("elastic."): value for name, value in weights.items()}
    write_interface(folder, own, transformer.elastic_record)


def load_transformer(folder: Path, **kwargs: Any) -> Model:
    """The elastified transformer in `folder`; see `load_elastic`."""
    record = read_record(folder)
    kind = known_networks().get(record.kind) or CLASSES.get(record.kind) or getattr(diffusers, record.kind, None)
    kind = kind or subclasses(diffusers.ModelMixin).get(record.kind)  # of somebody's own
    if kind is None:
        raise ValueError(f"cannot load {str(folder)!r}: its class {record.kind} is not known; import it first")
    variant = "-".join(filter(None, (VARIANT if record.changed else "", kwargs.pop("variant", None)))) or None
    places, placing = kwargs.get("device_map"), {}
    if places in ("auto", "balanced", "balanced_low_0", "sequential") or (isinstance(places, dict) and len(places) > 1):
        placing = {name: kwargs.pop(name, None) for name in ("device_map", "max_memory", "offload_folder")}
    transformer = load_whole(kind, folder, saved_dtype(folder, "folder"), variant=variant, **kwargs)
    for weight in transformer.parameters():  # in a mapped file some lie where they take other kernels
        if type(weight.data) is Tensor and weight.device.type == "cpu" and weight.data_ptr() % 64:
            weight.data = weight.data.clone()
    _restore(transformer, record, folder)
    transformer.eval()  # spread over devices with its dial, which comes before hooks
    return compat.dispatched(transformer, "ElasticInterface", **placing) if placing else transformer


def _restore(transformer: Model, record: InterfaceRecord, folder: Path) -> None:
    """Adds interface and low-rank changes as in `record`, with the weights in `folder`."""
    elastify(transformer, **{name: getattr(record, name) for name in ("read_after", "write_after", "window", "mode")})
    if record.lora_rank:
        add_low_rank(transformer, record.lora_rank)
    transformer.elastic_record = record
    try:
        transformer.elastic.load_state_dict(load_file(folder / WEIGHTS))
    except RuntimeError:
        raise ValueError(f"cannot load {str(folder)!r}: its {WEIGHTS} is for other sizes, or damaged") from None


class ElasticPipeline(NamedTuple):
    """A pipeline with an elastified transformer, as its folder describes it."""

    folder: Path
    base: str  # The pipeline's folder or hub name; `folder` itself where it holds everything.
    budgets: range
    options: dict[str, Any]  # How the base was loaded.

    def load(self, *, device: torch.device | str, dtype: torch.dtype) -> Pipeline:
        """The pipeline. Raises ValueError where it cannot be loaded."""
        try:
            if self.base == str(self.folder):
                return load_elastic(self.folder, torch_dtype=dtype).to(device)
            pipe = diffusers.DiffusionPipeline.from_pretrained(self.base, torch_dtype=dtype, **self.options)
            return load_elastic(pipe, self.folder).to(device)
        except (OSError, KeyError, ImportError, AttributeError) as error:
            raise ValueError(f"cannot load the pipeline of {str(self.folder)!r}: {one_line(error)}") from None


def open_pipeline(model: str | Path) -> ElasticPipeline | None:
    """The pipeline in a folder, or that of an add-on, opened before anything is loaded; None for any other folder."""
    folder = Path(model)
    whole = (folder / "model_index.json").is_file()
    places = sorted(folder.glob(f"*/{RECORD}" if whole else RECORD)) or sorted(folder.glob(f"transformer/{RECORD}"))
    if not places or (not whole and (folder / "config.json").is_file()):
        return None
    record = read_record(places[0].parent)
    if (base := str(folder) if whole else record.base) is None:
        raise ValueError(f"cannot open {str(model)!r}: an add-on that does not name its pipeline; save both together")
    try:
        own = "ElitPipeline" in diffusers.DiffusionPipeline.load_config(base)["_class_name"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"cannot find the pipeline {base!r} of {str(model)!r}: {one_line(error)}") from None
    return None if own else ElasticPipeline(folder, base, range(1, prod(record.window) + 1), record.base_options or {})


def load_network(
    name: str | Path, *, vae: Path | None = None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Model, Model]:
    """The model that `elit.load_model` gives for `name`, ready to be sampled, and the autoencoder it was trained in."""
    model = load_model(name, torch_dtype=dtype).to(device).eval()
    autoencoder = load_autoencoder(vae or Path(name) / "vae", required=vae is not None, torch_dtype=dtype)
    if autoencoder is None:
        return model, None
    channels = autoencoder.config.get("latent_channels") or autoencoder.config.get("z_dim")
    if isinstance(model, Transformer) and channels not in (None, model.config.in_channels):
        other = f"its latents have {channels} channels, the network's samples {model.config.in_channels}"
        raise ValueError(f"vae={str(vae or name)!r}: {other}; give the autoencoder that it was trained in")
    return model, autoencoder.to(device)
