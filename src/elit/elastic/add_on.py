"""The add-on: what distillation has learned, in a small file that a stock pipeline takes in.

    pipe = QwenImagePipeline.from_pretrained("Qwen/Qwen-Image", torch_dtype=torch.bfloat16).to("cuda")
    elit.load_elastic(pipe, "user/qwen-image-elit")
    with elit.budget(0.5):
        pipe("a red boat")

FOLDER/elastic.json         where the interface sits, the rank of the low-rank changes, size and CRC of the weights
FOLDER/elastic.safetensors  interface and low-rank changes
FOLDER/transformer/         instead of both, where all weights were trained: the whole transformer, see `storage.py`
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from elit.elastic.recording import write_tensors
from elit.elastic.storage import RECORD, WEIGHTS
from elit.files import fingerprint, write_text


def save_add_on(transformer: Any, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Writes what was trained into `folder`. weights: by name, whole, on the CPU; all or those of `elastic` alone."""
    if any(not name.startswith("elastic.") for name in weights):
        transformer.load_state_dict(dict(weights), strict=False)
        transformer.save_pretrained(folder / "transformer")
        return
    (folder / RECORD).unlink(missing_ok=True)  # beside new weights it would vouch for the old ones
    write_tensors(
        {name.removeprefix("elastic."): value for name, value in weights.items()}, folder / WEIGHTS, {"format": "pt"}
    )
    content = dataclasses.asdict(transformer.elastic_record)
    content["weights"] = fingerprint(folder / WEIGHTS)
    content["note"] = "load it into the pipeline that it was made for: elit.load_elastic(pipe, folder)"
    write_text(folder / RECORD, json.dumps(content, indent=2) + "\n")


def load_weights(transformer: Any, folder: Path) -> None:
    """Reads interface and low-rank changes. Raises ValueError where they have other shapes."""
    weights = load_file(folder / WEIGHTS)
    own = {name: tuple(value.shape) for name, value in transformer.elastic.state_dict().items()}
    if own != {name: tuple(value.shape) for name, value in weights.items()}:
        raise ValueError(
            f"folder={str(folder)!r}: its {WEIGHTS} does not fit: made for other sizes, or damaged; copy it again"
        )
    with torch.no_grad():
        transformer.elastic.load_state_dict(weights)


def fetch(name: str | Path) -> Path:
    """A folder as it is; of a hub repository, a copy of its add-on. Raises ValueError where there is neither."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = [RECORD, WEIGHTS, "transformer/*"]
        return Path(snapshot_download(str(name), allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"name={str(name)!r}: no such folder, and not to be had from the hub ({reason})") from None
