"""Elastified transformers on disk: diffusers' own files, untouched, and the interface beside them.

FOLDER/config.json, diffusion_pytorch_model*.safetensors    as diffusers writes them
FOLDER/elastic.json                                         where the interface sits; size and CRC of its weights
FOLDER/elastic.safetensors                                  its weights, and those of the low-rank changes

An add-on, what distillation has learned, is the last two alone: a small file that a stock pipeline takes in. Where all
weights were trained it is the whole transformer, in FOLDER/transformer/.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from elit.compat import LORA_WEIGHT, WRAPPED_LAYER
from elit.elastic.families import FAMILIES
from elit.elastic.families.family import Model
from elit.files import fingerprint, replacing, write_text
from elit.models.saved import ELASTIC

RECORD, WEIGHTS = ELASTIC, "elastic.safetensors"
VARIANT = "elastic"


@dataclasses.dataclass(frozen=True, kw_only=True)
class InterfaceRecord:
    """The place of an interface in a class of transformers."""

    kind: str
    read_after: int
    write_after: int
    window: tuple[int, ...]
    mode: str
    changed: bool = False
    """The original weights have been trained along, and are no model without the interface."""
    lora_rank: int = 0
    """Rank of the low-rank changes of the blocks beside the interface; 0 for none."""
    original_at_full: bool = False
    """At full budget the original runs, without interface and changes: it was trained for the budgets below."""
    base: str | None = None
    """The pipeline that the interface was trained for."""


def sample_weights(transformer: nn.Module, count: int = 16) -> dict[str, Tensor]:
    """A few values of each of the original weights, by name, to tell later whether they were trained."""
    samples = {}
    for name, weight in transformer.named_parameters():
        if not name.startswith("elastic.") and LORA_WEIGHT not in name:
            try:
                values = weight.detach().flatten()
            except NotImplementedError:  # torchao's quantised weights cannot be flattened, and are never trained
                continue
            samples[name.replace(WRAPPED_LAYER, ".")] = values[:: max(1, len(values) // count)][:count].cpu().clone()
    return samples


def save_beside(transformer: Model, folder: str | Path, save: Callable[..., None]) -> None:
    """Writes `transformer` with `save`, diffusers' save_pretrained, and its interface beside it.

    The interface first: `save` may upload the folder. Raises ValueError where LoRAs hang on the weights.
    """
    if any(WRAPPED_LAYER in name for name, _ in transformer.named_parameters()):
        # diffusers would write them under names that from_pretrained does not find.
        raise ValueError(
            "cannot save a transformer with LoRA adapters: save those with save_lora_adapter, and delete or fuse them"
        )
    folder, record = Path(folder), transformer.elastic_record
    now, then = sample_weights(transformer), transformer.elastic_samples
    changed = record.changed or any(not torch.equal(now[name], then[name].to(now[name].dtype)) for name in then)
    # If this stops half way, the remains do not load as a whole model.
    for path in folder.glob("diffusion_pytorch_model*"):
        if changed and f".{VARIANT}" not in path.name:
            path.unlink()
    interface = transformer.elastic
    record = dataclasses.replace(record, changed=changed)
    note = "load this folder, or the pipeline it is in, with elit.load_elastic"
    note += "; its weights were trained together with the interface and are no model without it" * changed
    _write_interface(folder, interface.state_dict(), record, note)
    del transformer.elastic
    try:
        save(folder, **({"variant": VARIANT} if changed else {}))
    finally:
        transformer.elastic = interface


def save_add_on(transformer: Model, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Writes what was trained into `folder`. weights: by name, whole, on the CPU; all or those of `elastic` alone."""
    if any(not name.startswith("elastic.") for name in weights):
        transformer.load_state_dict(dict(weights), strict=False)
        transformer.save_pretrained(folder / "transformer")
        return
    own = {name.removeprefix("elastic."): value for name, value in weights.items()}
    note = "load it into the pipeline that it was made for: elit.load_elastic(pipe, folder)"
    _write_interface(folder, own, transformer.elastic_record, note)


def _write_interface(folder: Path, weights: Mapping[str, Tensor], record: InterfaceRecord, note: str) -> None:
    (folder / RECORD).unlink(missing_ok=True)  # beside new weights it would vouch for the old ones
    with replacing(folder / WEIGHTS) as temporary:
        try:
            plain = {name: value.detach().contiguous().cpu() for name, value in weights.items()}
            save_file(plain, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(
                f"cannot write {str(folder / WEIGHTS)!r}: {error}; make room, or give another folder"
            ) from None
    content = dataclasses.asdict(record) | {"weights": fingerprint(folder / WEIGHTS), "note": note}
    write_text(folder / RECORD, json.dumps(content, indent=2) + "\n")


def read_record(folder: Path) -> InterfaceRecord:
    """The record in a folder. Raises ValueError where it or the weights beside it are missing or damaged."""
    name = f"cannot load {str(folder)!r}"
    if not (folder / RECORD).is_file():
        raise ValueError(f"{name}: no {RECORD} in it; give a folder that an elastified model was saved in")
    try:
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        size_and_sum, _ = content.pop("weights"), content.pop("note")
        record = InterfaceRecord(**content | {"window": tuple(content["window"])})
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{name}: its {RECORD} is damaged; save or copy it again") from None
    if record.kind not in FAMILIES:
        raise ValueError(f"{name}: holds an elastified {record.kind!r}; known: {', '.join(FAMILIES)}")
    if not (folder / WEIGHTS).is_file() or fingerprint(folder / WEIGHTS) != size_and_sum:
        raise ValueError(f"{name}: its {WEIGHTS} is missing or damaged; save or copy it again")
    return record
