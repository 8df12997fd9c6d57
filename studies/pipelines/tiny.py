"""Small diffusers transformers and pipelines of random weights, and inputs for them: smooth ones, as pictures are."""

from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import elit

HEADS = {"num_attention_heads": 2, "attention_head_dim": 12}
TEXT = 5
FOUR = {"in_channels": 4, "out_channels": 4, "num_layers": 4}
FLUX = {"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 20}
ROTARY = {"axes_dims_rope": (4, 4, 4)}
WAN = FOUR | {"text_dim": 20, "freq_dim": 16, "ffn_dim": 48}
SETTINGS: dict[str, dict[str, Any]] = {
    "DiTTransformer2DModel": FOUR | {"sample_size": 16, "num_embeds_ada_norm": 1000},
    "QwenImageTransformer2DModel": FOUR | ROTARY | {"in_channels": 16, "joint_attention_dim": 20},
    "FluxTransformer2DModel": FLUX | ROTARY | {"pooled_projection_dim": 10, "guidance_embeds": True},
    "SD3Transformer2DModel": FOUR | {
        "sample_size": 16, "joint_attention_dim": 20, "caption_projection_dim": 24, "pooled_projection_dim": 10,
        "pos_embed_max_size": 16, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm",
    },
    "PixArtTransformer2DModel": FOUR | {
        "sample_size": 16, "out_channels": 8, "cross_attention_dim": 24, "caption_channels": 20, "norm_num_groups": 2,
    },
    "WanTransformer3DModel": WAN,
    "QwenImage21Transformer2DModel": FOUR | ROTARY | {"in_channels": 16, "out_channels": 16, "context_in_dim": 20},
    "Flux2Transformer2DModel": FLUX | {"timestep_guidance_channels": 16, "axes_dims_rope": (4, 4, 2, 2)},
    "ChromaTransformer2DModel": FLUX | ROTARY | {
        "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1,
    },
    "ZImageTransformer2DModel": {
        "in_channels": 4, "dim": 24, "n_layers": 4, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
        "cap_feat_dim": 20, "axes_dims": [4, 4, 4], "axes_lens": [128, 64, 64],
    },
    "Lumina2Transformer2DModel": {
        "sample_size": 16, "in_channels": 4, "hidden_size": 24, "num_layers": 4, "num_refiner_layers": 1,
        "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 8, "axes_dim_rope": (4, 4, 4),
        "axes_lens": (64, 64, 64), "cap_feat_dim": 20,
    },
    "WanVACETransformer3DModel": WAN | {"vace_layers": [0, 1, 2], "vace_in_channels": 8},
    "CogVideoXTransformer3DModel": FOUR | {
        "text_embed_dim": 20, "time_embed_dim": 16, "use_rotary_positional_embeddings": True,
        "max_text_seq_length": TEXT,
    },
    "HunyuanVideo15Transformer3DModel": FOUR | {
        "num_refiner_layers": 1, "text_embed_dim": 20, "text_embed_2_dim": 10, "image_embed_dim": 8,
        "rope_axes_dim": (4, 4, 4),
    },
    "LTX2VideoTransformer3DModel": FOUR | {
        "cross_attention_dim": 24, "caption_channels": 20, "audio_in_channels": 4, "audio_out_channels": 4,
        "audio_num_attention_heads": 2, "audio_attention_head_dim": 6, "audio_cross_attention_dim": 12,
    },
}  # fmt: skip
KINDS, MORE = list(SETTINGS)[:6], list(SETTINGS)[6:]
VIDEOS = [*KINDS[5:], *MORE[5:]]


def build(kind: str, **changes: Any) -> nn.Module:
    """A network of 4 blocks, width 24, 8×8 tokens (Wan: 2×4×8); nothing starts at zero."""
    torch.manual_seed(0)
    heads = {} if kind.startswith(("ZImage", "Lumina2")) else HEADS
    model = getattr(diffusers, kind)(**heads | SETTINGS[kind] | changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():
                nn.init.xavier_uniform_(parameter)
    return model.eval()


def picture(channels: int, size: tuple[int, ...], batch: int, seed: int) -> Tensor:
    """(B, C, *size) without detail: a few random cells, enlarged."""
    cells = (max(2, side // 6) for side in size)
    few = torch.randn(batch, channels, *cells, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(few, size, mode="bilinear" if len(size) == 2 else "trilinear")


def inputs(kind: str, batch: int = 2, seed: int = 0, grid: tuple[int, ...] | None = None) -> dict[str, Any]:
    """Arguments of a forward on a token grid; the padding of the second text is masked where the class knows masks."""
    grid = grid or ((2, 4, 8) if kind in VIDEOS else (8, 8))
    generator = torch.Generator().manual_seed(seed + 1)
    text = torch.randn(batch, TEXT, 20, generator=generator)
    mask = torch.arange(TEXT) < torch.tensor([TEXT] + [TEXT - 2] * (batch - 1))[:, None]
    pooled = torch.randn(batch, 10, generator=generator)
    level = torch.rand(batch, generator=generator)
    cells = (*grid[:-2], 2 * grid[-2], 2 * grid[-1])
    x = picture(4, cells, batch, seed)
    common = {"hidden_states": x, "timestep": (level * 1000).long(), "encoder_hidden_states": text}
    if kind in VIDEOS:
        return common | video_inputs(kind, grid, x, text, mask, level, seed)
    if kind.startswith(("Qwen", "Flux", "Chroma")):
        packed = F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)  # (B, 64, 16)
        common |= {"hidden_states": packed, "timestep": level}
        if kind.startswith("Qwen"):
            common |= {"encoder_hidden_states_mask": mask, "img_shapes": [[(1, *grid)]] * batch}
            slots = torch.arange(TEXT + grid[0] * grid[1] // 4) >= TEXT
            return common | ({"img_mask": slots.expand(batch, -1)} if kind.startswith("QwenImage21") else {})
        rows, columns = torch.meshgrid(*(torch.arange(float(side)) for side in grid), indexing="ij")
        ids = torch.stack((torch.zeros(grid), rows, columns), -1).flatten(0, 1)
        common |= {"img_ids": ids, "txt_ids": torch.zeros(TEXT, 3)}
        if kind.startswith("Chroma"):
            padded = torch.cat((mask, torch.ones(batch, len(ids), dtype=torch.bool)), 1)
            return common | {"attention_mask": padded}
        common["guidance"] = torch.full((batch,), 3.5)
        if kind.startswith("Flux2"):
            ids = torch.cat((ids, torch.zeros(len(ids), 1)), 1).expand(batch, -1, -1)
            return common | {"img_ids": ids, "txt_ids": torch.zeros(batch, TEXT, 4)}
        return common | {"pooled_projections": pooled}
    if kind.startswith("ZImage"):
        captions = [row[valid] for row, valid in zip(text, mask, strict=True)]
        return {"x": list(x[:, :, None].unbind()), "t": 1 - level, "cap_feats": captions}
    if kind.startswith("Lumina2"):
        return common | {"timestep": 1 - level, "encoder_attention_mask": mask}
    if kind.startswith("DiT"):
        del common["encoder_hidden_states"]
        return common | {"class_labels": torch.randint(0, 1000, (batch,), generator=generator)}
    if kind.startswith("SD3"):
        return common | {"pooled_projections": pooled}
    return common | {"encoder_attention_mask": mask.float(), "added_cond_kwargs": {}}


def video_inputs(
    kind: str, grid: tuple[int, ...], x: Tensor, text: Tensor, mask: Tensor, level: Tensor, seed: int
) -> dict[str, Any]:
    """Beside those that all have."""
    batch, masked = len(x), {"encoder_attention_mask": mask.float()}
    if kind == "WanTransformer3DModel":
        return {}
    if kind.startswith("WanVACE"):
        return {"control_hidden_states": picture(8, tuple(x.shape[2:]), batch, seed + 1)}
    if kind.startswith("CogVideoX"):
        tables = torch.randn(2, grid[0] * grid[1] * grid[2], 12).cos()
        return {"hidden_states": x.transpose(1, 2), "image_rotary_emb": tuple(tables)}
    x = picture(4, grid, batch, seed)
    if kind.startswith("Hunyuan"):
        second, image = torch.randn(batch, 3, 10), torch.zeros(batch, 2, 8)
        texts = {"encoder_hidden_states_2": second, "encoder_attention_mask_2": torch.ones(batch, 3)}
        return masked | texts | {"image_embeds": image, "hidden_states": x, "timestep": level * 1000}
    sizes = dict(zip(("num_frames", "height", "width"), grid, strict=True))
    audio = {"audio_hidden_states": torch.randn(batch, 3, 4), "audio_num_frames": 3}
    return masked | sizes | audio | {"audio_encoder_hidden_states": text, "hidden_states": x.flatten(2).transpose(1, 2)}


def window(kind: str) -> tuple[int, ...]:
    return (2, 2, 4) if kind in VIDEOS else (4, 4)


def autoencoder() -> Any:
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3, shift_factor=0.1,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, norm_num_groups=4, layers_per_block=1,
    ).eval()  # fmt: skip


def pipeline(name: str) -> Any:
    """A stock pipeline from tiny random parts, without text encoders: prompts come as embeddings."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    if name == "DiTPipeline":
        made = diffusers.DiTPipeline(build("DiTTransformer2DModel"), autoencoder(), diffusers.DDIMScheduler())
    elif name == "QwenImagePipeline":
        torch.manual_seed(1)
        vae = diffusers.AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True],
            latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
        )  # fmt: skip
        made = diffusers.QwenImagePipeline(scheduler, vae.eval(), None, None, build("QwenImageTransformer2DModel"))
    elif name == "FluxPipeline":
        made = diffusers.FluxPipeline(scheduler, autoencoder(), *[None] * 4, build("FluxTransformer2DModel"))
    else:
        parts = (build("SD3Transformer2DModel"), scheduler, autoencoder())
        made = diffusers.StableDiffusion3Pipeline(*parts, *[None] * 6)
    made.set_progress_bar_config(disable=True)
    return made


PIPELINES = ["QwenImagePipeline", "FluxPipeline", "StableDiffusion3Pipeline", "DiTPipeline"]


def draw(pipe: Any, steps: int = 2, batch: int = 1, output_type: str = "pt", **changes: Any) -> Tensor:
    """Guided samples of a pipeline, the same each time; output_type="latent" for what DiT's does not know."""
    dtype = pipe.transformer.dtype
    generator = torch.Generator().manual_seed(5)
    if isinstance(pipe, diffusers.DiTPipeline):  # of no size
        labels = list(range(7, 7 + batch))
        return pipe(labels, 4.0, generator, num_inference_steps=steps, output_type="pt").images
    text = torch.randn(2, batch, TEXT, 20, generator=generator).to(dtype)
    pooled = torch.randn(2, batch, 10, generator=generator).to(dtype)
    given = {"prompt_embeds": text[0], "negative_prompt_embeds": text[1], "generator": generator}
    size = {"height": 64, "width": 64, "num_inference_steps": steps, "output_type": output_type}
    if not isinstance(pipe, diffusers.QwenImagePipeline):
        given |= {"pooled_prompt_embeds": pooled[0], "negative_pooled_prompt_embeds": pooled[1]}
    if not isinstance(pipe, diffusers.StableDiffusion3Pipeline):
        given |= {"true_cfg_scale": 3.0}
    return pipe(**given | size | changes).images


def with_text(name: str) -> Any:
    """A tiny pipeline whose prompts are random vectors, a function of their words."""
    pipe = pipeline(name)

    def embed(prompts: str | list[str], *shape: int) -> Tensor:
        prompts = [prompts] if isinstance(prompts, str) else prompts
        generators = [torch.Generator().manual_seed(sum(map(ord, prompt))) for prompt in prompts]
        return torch.stack([torch.randn(*shape, generator=generator) for generator in generators])

    def encode(prompt: Any = None, negative_prompt: Any = None, **rest: Any) -> tuple[Tensor, ...]:
        if name == "QwenImagePipeline":
            text = embed(prompt, TEXT, 20)
            return text, torch.ones(len(text), TEXT, dtype=torch.long)
        if name == "FluxPipeline":
            return embed(prompt, TEXT, 20), embed(prompt, 10), torch.zeros(TEXT, 3)
        texts = (prompt, negative_prompt or [""] * len(prompt))
        return *(embed(text, TEXT, 20) for text in texts), *(embed(text, 10) for text in texts)

    if hasattr(pipe, "encode_prompt"):
        pipe.encode_prompt = encode
    return pipe


def open_branches(model: Any) -> Any:
    """As after training: every branch of the interface does something."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.elastic.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


SPLIT: dict[str, Any] = {"read_after": 1, "write_after": 3, "window": (4, 4)}


def elastic(kind: str, **changes: Any) -> nn.Module:
    return open_branches(elit.elastify(build(kind, **changes), **SPLIT | {"window": window(kind)}))


def output(model: nn.Module, kind: str, budget: Any = 4, **changes: Any) -> Tensor:
    with torch.no_grad(), elit.budget(budget):
        return torch.stack(list(model(**inputs(kind) | changes, return_dict=False)[0]))


def elastic_pipeline(name: str, opened: bool = False) -> Any:
    pipe = elit.elastify(pipeline(name), **SPLIT)
    if opened:
        open_branches(pipe.transformer)
    return pipe


class Spy:
    """Notes J̃ of every run through the core, and on how many samples."""

    def __init__(self, transformer: Any, monkeypatch: Any):
        self.seen: list[tuple[int, int]] = []
        self.plans: list[list[int]] = []
        finish = transformer.elastic.finish

        def noted(tokens: Tensor, start: Any, latents: Any, plan: Any) -> Any:
            self.seen.append((plan.grids[0].budget, len(tokens)))
            self.plans.append([grid.budget for grid in plan.grids])
            return finish(tokens, start, latents, plan)

        monkeypatch.setattr(transformer.elastic, "finish", noted)

    def kept(self) -> list[int]:
        """J̃ of the runs since the last call."""
        found = [budget for budget, _ in self.seen]
        self.seen.clear()
        return found
