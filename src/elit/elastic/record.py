"""Files of an interface beside diffusers' own: elastic.json says where it sits, elastic.safetensors has its weights."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from elit import compat
from elit.elastic.families.family import Model
from elit.files import fingerprint, replacing, write_text
from elit.models.saved import ELASTIC

RECORD, WEIGHTS = ELASTIC, "elastic.safetensors"
PIPELINE = """# pipe = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline="pipeline", trust_remote_code=True)
# pipe(prompt, budget=0.25)
import diffusers
from elit.elastic.load import with_dial

Pipeline = with_dial(diffusers.{})
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class InterfaceRecord:
    """The place of an interface in a class of transformers."""

    kind: str
    read_after: int
    write_after: int
    window: tuple[int, ...]
    mode: str
    changed: bool = False  # The original weights have been trained along, and are no model without the interface.
    lora_rank: int = 0  # Rank of the low-rank changes of the blocks beside the interface; 0 for none.
    original_at_full: bool = False  # At full budget the original runs: it was trained for the budgets below.
    base: str | None = None  # The pipeline that the interface was trained for.
    base_options: dict[str, Any] | None = None  # How that was loaded: variant, revision.
    size: tuple[int, int] | None = None  # (height, width) in pixels that it was trained at first.
    config: dict[str, Any] | None = None  # Settings of the transformer; older files have none.


def settings_of(model: Model) -> dict[str, Any]:
    """Settings in which two transformers of a class must agree for one's add-on to fit the other."""
    config = dict(getattr(model, "config", {}))
    free = ("sample_size", "quantization_config")
    plain = {name: value for name, value in config.items() if not name.startswith("_") and name not in free}
    return json.loads(json.dumps(plain, default=str))


def sample_weights(transformer: Model) -> dict[str, Tensor]:
    """Some 16 values of each of the original weights, by name, to tell later whether they were trained."""
    samples = {}
    for name, weight in transformer.named_parameters():
        known = not name.startswith("elastic.") and compat.LORA_WEIGHT not in name
        if known and not compat.is_quantised(weight):  # what is quantised is never trained
            values = weight.detach().flatten()
            some = values[:: max(1, len(values) // 16)][:16]
            samples[name.replace(compat.WRAPPED_LAYER, ".")] = some.cpu().clone()
    return samples


def write_interface(folder: Path, weights: Mapping[str, Tensor], record: InterfaceRecord) -> None:
    """Writes the interface's two files."""
    (folder / RECORD).unlink(missing_ok=True)  # beside new weights it would vouch for the old ones
    with replacing(folder / WEIGHTS) as temporary:
        plain = {name: value.detach().contiguous().cpu() for name, value in weights.items()}
        save_file(plain, temporary, metadata={"format": "pt"})
    content = dataclasses.asdict(record) | {"weights": fingerprint(folder / WEIGHTS)}
    write_text(folder / RECORD, json.dumps(content, indent=2) + "\n")


def read_record(folder: Path) -> InterfaceRecord:
    """The record in a folder. Raises ValueError where it or the weights beside it are missing or damaged."""
    name = f"cannot load {str(folder)!r}"
    if not (folder / RECORD).is_file():
        raise ValueError(f"{name}: no {RECORD} in it; give a folder that an elastified model was saved in")
    try:
        content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        size_and_sum, _ = content.pop("weights"), content.pop("note", None)  # which older files have
        size = content.get("size") and tuple(content["size"])
        record = InterfaceRecord(**content | {"window": tuple(content["window"]), "size": size})
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{name}: its {RECORD} is damaged; save or copy it again") from None
    if not (folder / WEIGHTS).is_file() or fingerprint(folder / WEIGHTS) != size_and_sum:
        raise ValueError(f"{name}: its {WEIGHTS} is missing or damaged; save or copy it again")
    return record
