"""Prompts for stock pipelines of tiny random parts, which have no text encoders."""

import inspect
from typing import Any

import diffusers
import torch
from parts import TEXT
from torch import Tensor


def with_prompts(pipe: Any) -> Any:
    """Its own `encode_prompt`, where in the place of a text encoder each prompt gives random vectors of its words."""
    encode = pipe.encode_prompt
    parameters = inspect.signature(encode).parameters
    vectors = {"prompt_embeds": (TEXT, 20), "pooled_prompt_embeds": (10,), "prompt_embeds_2": (3, 10)}
    masks = {"prompt_attention_mask": TEXT, "prompt_embeds_mask": TEXT, "prompt_embeds_mask_2": 3}

    def embed(prompts: list[str], *shape: int) -> Tensor:
        generators = [torch.Generator().manual_seed(sum(map(ord, prompt))) for prompt in prompts]
        return torch.stack([torch.randn(*shape, generator=generator) for generator in generators])

    def encoded(*args: Any, **kwargs: Any) -> Any:
        asked = inspect.signature(encode).bind(*args, **kwargs).arguments
        for prefix in ("", "negative_"):
            given = asked["prompt"] if isinstance(asked["prompt"], list) else [asked["prompt"]]
            prompts = asked.get(f"{prefix}prompt") or [""] * len(given)
            prompts = [prompts] if isinstance(prompts, str) else prompts
            for name, shape in vectors.items():
                if prefix + name in parameters:
                    asked[prefix + name] = embed(prompts, *shape)
            for name, length in masks.items():
                if prefix + name in parameters:
                    asked[prefix + name] = torch.ones(len(prompts), length, dtype=torch.bool)
            if isinstance(pipe, diffusers.ZImagePipeline):
                asked[prefix + "prompt_embeds"] = list(asked[prefix + "prompt_embeds"])
        return encode(**asked)

    encoded.__signature__ = inspect.signature(encode)  # pyrefly: ignore[missing-attribute]
    pipe.encode_prompt = encoded
    return pipe
