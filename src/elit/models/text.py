"""Encoding of prompts for networks that take text: the built-in characters, or an encoder of the Hugging Face hub."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from elit.compat import forward_device
from elit.config import require
from elit.files import replacing
from elit.models.conditioning import CHARACTERS, Condition, Text, encode_characters
from elit.models.saved import quiet_loading

CACHE = ".text"  # folder of kept embeddings beside the images


class TextEncoder:
    """A Hugging Face text encoder (CLIP, T5, BERT, a language model, …) by name or folder; needs the extra `text`.

    length: tokens of a prompt at most, longer ones are cut. Raises ValueError where transformers is missing, the name
    is neither a folder nor to be had from the hub, or the encoder takes fewer tokens.
    """

    def __init__(self, name: str, *, length: int, device: torch.device | str = "cpu", dtype: torch.dtype | None = None):
        try:
            from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, AutoConfig, AutoModel, AutoTokenizer
        except ImportError:
            raise ValueError("cannot encode text without transformers: pip install '.[text]' in a clone") from None
        try:
            with quiet_loading():
                config = AutoConfig.from_pretrained(name)
                self.tokenizer: Any = AutoTokenizer.from_pretrained(name)
                # The text half of CLIP, the encoder of T5; anything else, such as a language model, whole.
                halves = [half for half in (config, getattr(config, "text_config", None)) if half is not None]
                half = next((half for half in halves if type(half) in MODEL_FOR_TEXT_ENCODING_MAPPING), None)
                kind: Any = AutoModel if half is None else MODEL_FOR_TEXT_ENCODING_MAPPING[type(half)]
                self.model: Any = kind.from_pretrained(name, config=half or config, dtype=dtype or torch.float32)
        except (OSError, ValueError) as error:
            reason = (str(error).splitlines() or ["no reason given"])[0]
            raise ValueError(f"cannot load text_encoder={name!r}: {reason}") from None
        self.model.eval().requires_grad_(False).to(device)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        longest = self.tokenizer.model_max_length
        longest = min(longest, getattr(half or config, "max_position_embeddings", None) or longest)
        require(1 <= length <= longest, "text_length", length, f"at most {longest} for {name}")
        self.length = length

    def __call__(self, prompts: Sequence[str], *, batch_size: int = 64) -> Text:
        """Prompts -> `Text` (P, M, F) on the CPU, M the longest of them; pooled (P, F) where the encoder gives it."""
        return embed_prompts(prompts, self.tokenizer, self.model, length=self.length, batch_size=batch_size)


@torch.no_grad()
def embed_prompts(prompts: Sequence[str], tokenizer: Any, model: Any, *, length: int, batch_size: int = 64) -> Text:
    """Encoding of prompts with transformers' own tokenizer and model, as `TextEncoder` does it."""
    parts = []
    options: dict[str, Any] = {"padding": "max_length", "truncation": True, "max_length": length}
    # Said for each call: a pipeline's tokenizer may pad on the left, and is not ours to change.
    options |= {"padding_side": "right", "return_tensors": "pt"}
    for first in range(0, len(prompts), batch_size):
        tokens = tokenizer(list(prompts[first : first + batch_size]), **options).to(forward_device(model))
        out = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        pooled = getattr(out, "pooler_output", None)
        mask = tokens.attention_mask.bool()
        parts.append((out.last_hidden_state[mask].cpu(), mask.cpu(), None if pooled is None else pooled.cpu()))
    embeddings, masks, pools = map(list, zip(*parts, strict=True))
    del parts
    mask = torch.cat(masks)
    mask = mask[:, : int(mask.any(0).sum())].contiguous()
    # Padded once, while the tokens as they came are let go: a padded copy may be hundreds of gigabytes.
    text = embeddings[0].new_zeros(*mask.shape, embeddings[0].shape[1])
    for first, size in reversed([(batch_size * i, len(rows)) for i, rows in enumerate(masks)]):
        text[first : first + size][mask[first : first + size]] = embeddings.pop()
    return Text(text, mask, None if pools[0] is None else torch.cat(pools))


def encode_prompts(
    prompts: Sequence[str], encoder: str, *, length: int, cache: Path | None = None, device: torch.device | str = "cpu"
) -> Condition:
    """One row of `y` for each prompt: characters, or the embeddings of a Hugging Face encoder. Raises ValueError."""
    if encoder == CHARACTERS:
        return encode_characters(prompts, length)
    if cache is None:
        return TextEncoder(encoder, length=length, device=device)(prompts)
    folder = Path(encoder)
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    state = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    digest = hashlib.sha256(json.dumps([encoder, length, state, list(prompts)]).encode()).hexdigest()[:24]
    path = cache / f"{digest}.safetensors"
    with suppress(OSError, SafetensorError):  # none there, or a damaged one
        return Text(**load_file(path))
    text = TextEncoder(encoder, length=length, device=device)(prompts)
    try:
        with replacing(path) as temporary:
            save_file({name: value for name, value in vars(text).items() if value is not None}, temporary)
    except OSError as error:
        raise ValueError(f"cannot keep the encoded prompts in {str(cache)!r}: {error.strerror}") from None
    return text
