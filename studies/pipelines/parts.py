"""Stock diffusers pipelines of tiny random parts, without text encoders, and a short guided run of each."""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from PIL import Image
from tiny import TEXT, autoencoder, build, draw, pipeline
from torch import Tensor

SIZE = {"height": 64, "width": 64}
Run = Callable[..., Tensor]


class Stock(NamedTuple):
    """A pipeline as diffusers makes it, and how to run it: run(pipe, **changes of its call)."""

    make: Callable[[], Any]
    run: Run
    forwards: int = 2
    """Of a sample and step: one of each branch; LTX-2 perturbs the guided one in two more."""


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def texts(width: int = 20) -> tuple[Tensor, Tensor]:
    """Embeddings of the prompt and the negative prompt, (1, L, width) each."""
    both = torch.randn(2, 1, TEXT, width, generator=torch.Generator().manual_seed(6))
    return both[0], both[1]


def photo() -> Tensor:
    return torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(7))


def picture() -> Any:
    return Image.fromarray((photo()[0].permute(1, 2, 0) * 255).byte().numpy())


def mask() -> Tensor:
    return (torch.arange(64)[None, None, :, None] < 32).float().expand(1, 1, 64, 64).contiguous()


def euler() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler()


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def calling(steps: int = 2, masked: bool = False, **settings: Any) -> Run:
    """A run by embeddings; masked: with masks of them."""

    def run(pipe: Any, **changes: Any) -> Tensor:
        text, negative = texts()
        given = {"prompt_embeds": text, "negative_prompt_embeds": negative, "generator": seeded()}
        if masked:
            ones = torch.ones(1, TEXT, dtype=torch.bool)
            given |= {"prompt_attention_mask": ones, "negative_prompt_attention_mask": ones}
        asked = {"num_inference_steps": steps, "output_type": "latent", **SIZE} | given | settings | changes
        output = pipe(**{name: value() if callable(value) else value for name, value in asked.items()})
        return output.images if hasattr(output, "images") else output.frames

    return run


POOLED: dict[str, Any] = {
    "pooled_prompt_embeds": lambda: torch.ones(1, 10),
    "negative_pooled_prompt_embeds": lambda: torch.zeros(1, 10),
    "true_cfg_scale": 3.0,
}


def flux(kind: str, **parts: Any) -> Callable[[], Any]:
    def make() -> Any:
        tiny = pipeline("FluxPipeline")
        return quiet(getattr(diffusers, kind)(
            **{name: value() for name, value in parts.items()},
            scheduler=tiny.scheduler, vae=tiny.vae, text_encoder=None, tokenizer=None, text_encoder_2=None,
            tokenizer_2=None, transformer=tiny.transformer,
        ))  # fmt: skip

    return make


def flux_controlnet() -> Any:
    torch.manual_seed(2)
    return diffusers.FluxControlNetModel(
        in_channels=16, num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=12,
        joint_attention_dim=20, pooled_projection_dim=10, axes_dims_rope=(4, 4, 4), guidance_embeds=True,
    ).eval()  # fmt: skip


def flux_with_ip_adapter() -> Any:
    pipe = flux("FluxPipeline")()
    torch.manual_seed(3)
    attention = {}
    for block in (0, 1):
        for part in ("k", "v"):
            attention[f"{block}.to_{part}_ip.weight"] = torch.randn(24, 20)
            attention[f"{block}.to_{part}_ip.bias"] = torch.randn(24)
    project = {"proj.weight": torch.randn(4 * 20, 8), "proj.bias": torch.randn(4 * 20)}
    project |= {"norm.weight": torch.ones(20), "norm.bias": torch.zeros(20)}
    pipe.transformer._load_ip_adapter_weights(
        [{"image_proj": project, "ip_adapter": attention}], low_cpu_mem_usage=False
    )
    return pipe


def qwen(kind: str, **extra: Any) -> Callable[[], Any]:
    def make() -> Any:
        tiny = pipeline("QwenImagePipeline")
        return quiet(getattr(diffusers, kind)(
            scheduler=tiny.scheduler, vae=tiny.vae, text_encoder=None, tokenizer=None,
            transformer=tiny.transformer, **extra,
        ))  # fmt: skip

    return make


def edited(pipe: Any, **changes: Any) -> Tensor:
    """An edit of 64×64 pixels: the pipeline itself makes a megapixel of any picture."""
    module: Any = sys.modules[type(pipe).__module__]
    sizes, module.calculate_dimensions = module.calculate_dimensions, lambda area, ratio: (64, 64, None)
    try:
        return calling(true_cfg_scale=3.0, image=picture)(pipe, **changes)
    finally:
        module.calculate_dimensions = sizes


def qwen_controlnet() -> Any:
    torch.manual_seed(2)
    return diffusers.QwenImageControlNetModel(
        in_channels=16, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=12,
        joint_attention_dim=20, axes_dims_rope=(4, 4, 4),
    ).eval()  # fmt: skip


def wan_vae() -> Any:
    torch.manual_seed(1)
    return diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ).eval()  # fmt: skip


def wan(kind: str, transformer: str = "WanTransformer3DModel", two: bool = False, **changes: Any) -> Callable[[], Any]:
    def make() -> Any:
        parts = {"transformer": build(transformer, **changes), "vae": wan_vae(), "scheduler": euler()}
        if two:
            parts |= {"transformer_2": build(transformer, **changes), "boundary_ratio": 0.5}
        if "ImageToVideo" in kind:
            parts |= {"image_encoder": None, "image_processor": None}
        return quiet(getattr(diffusers, kind)(tokenizer=None, text_encoder=None, **parts))

    return make


FRAMES: dict[str, Any] = {"num_frames": 5, "guidance_scale": 3.0}


def flux2_vae() -> Any:
    torch.manual_seed(1)
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, norm_num_groups=4, layers_per_block=1,
    ).eval()  # fmt: skip


def simple(
    kind: str,
    transformer: str,
    vae: Callable[[], Any] | None = None,
    scheduler: Callable[[], Any] = euler,
    **changes: Any,
) -> Callable[[], Any]:
    """A pipeline with one text encoder."""

    def make() -> Any:
        parts = {"transformer": build(transformer, **changes), "vae": vae and vae(), "scheduler": scheduler()}
        return quiet(getattr(diffusers, kind)(text_encoder=None, tokenizer=None, **parts))

    return make


def list_of_texts(**settings: Any) -> Run:
    """Z-Image takes a list, with a text (L, width) a prompt."""
    text, negative = texts()
    return calling(prompt_embeds=[text[0]], negative_prompt_embeds=[negative[0]], **settings)


def pixart() -> Any:
    parts = {"transformer": build("PixArtTransformer2DModel"), "scheduler": diffusers.DPMSolverMultistepScheduler()}
    return quiet(diffusers.PixArtAlphaPipeline(tokenizer=None, text_encoder=None, vae=autoencoder(), **parts))


def hunyuan_vae() -> Any:
    torch.manual_seed(1)
    channels = (8, 8, 8, 8, 8)
    return diffusers.AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=channels, layers_per_block=1)


def hunyuan() -> Any:
    return quiet(diffusers.HunyuanVideo15Pipeline(
        text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None, vae=hunyuan_vae(), scheduler=euler(),
        transformer=build("HunyuanVideo15Transformer3DModel", in_channels=9),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
    ))  # fmt: skip


def hunyuan_run(pipe: Any, num_inference_steps: int = 2) -> Tensor:
    text, negative = texts()
    second = torch.ones(1, 3, 10)
    given = {"prompt_embeds": text, "negative_prompt_embeds": negative, "prompt_embeds_2": second}
    given |= {"negative_prompt_embeds_2": 0 * second}
    for name in ("prompt_embeds_mask", "negative_prompt_embeds_mask"):
        given |= {name: torch.ones(1, TEXT), f"{name.removesuffix('_mask')}_mask_2": torch.ones(1, 3)}
    size = {"height": 128, "width": 64, "num_frames": 5}
    return pipe(
        **given, **size, num_inference_steps=num_inference_steps, generator=seeded(), output_type="latent"
    ).frames


def cog_vae() -> Any:
    torch.manual_seed(1)
    return diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
    ).eval()  # fmt: skip


def ltx2() -> Any:
    """With its audio half: autoencoder, vocoder, and the connectors between the text encoder and both."""
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
        layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1), spatio_temporal_scaling=(True,) * 3,
        decoder_spatio_temporal_scaling=(True,) * 3, decoder_inject_noise=(False,) * 4,
        down_block_types=("LTX2VideoDownBlock3D",) * 3, downsample_type=("spatial", "spatial", "spatiotemporal"),
        upsample_type=("spatiotemporal", "spatial", "spatial"), upsample_residual=(False,) * 3,
        upsample_factor=(1,) * 3, patch_size=1,
    )  # fmt: skip
    audio = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8,
    )  # fmt: skip
    connect: dict[str, Any] = {}
    for kind in ("video", "audio"):
        connect |= {f"{kind}_connector_num_attention_heads": 2, f"{kind}_connector_attention_head_dim": 10}
        connect |= {f"{kind}_connector_num_layers": 1, f"{kind}_connector_num_learnable_registers": None}
    connectors = LTX2TextConnectors(
        caption_channels=20, text_proj_in_factor=1, connector_rope_base_seq_len=32, **connect
    )  # fmt: skip
    vocoder = LTX2Vocoder(
        in_channels=16, hidden_channels=32, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2],
        resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]],
    )  # fmt: skip
    return quiet(diffusers.LTX2Pipeline(
        scheduler=euler(), vae=vae.eval(), audio_vae=audio.eval(), text_encoder=None, tokenizer=None,
        connectors=connectors.eval(), transformer=build("LTX2VideoTransformer3DModel"), vocoder=vocoder.eval(),
    ))  # fmt: skip


class Processor:
    """As much of a processor as QwenImage21Pipeline asks when it is made."""

    tokenizer = property(lambda self: self)

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        return [[0]]

    def encode(self, text: str) -> list[int]:
        return [0]


def qwen21() -> Any:
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKLQwenImage21(
        base_dim=8, decoder_base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.0] * 16, latents_std=[1.0] * 16,
    )  # fmt: skip
    return quiet(diffusers.QwenImage21Pipeline(
        scheduler=euler(), vae=vae.eval(), text_encoder=None, processor=Processor(),
        transformer=build("QwenImage21Transformer2DModel"),
    ))  # fmt: skip


def drawn(pipe: Any, num_inference_steps: int = 2) -> Tensor:
    return draw(pipe, num_inference_steps)


PIPELINES: dict[str, Stock] = {
    "DiTPipeline": Stock(lambda: pipeline("DiTPipeline"), drawn),
    "PixArtAlphaPipeline": Stock(
        pixart, calling(masked=True, guidance_scale=3.0, use_resolution_binning=False, negative_prompt=None)
    ),
    "StableDiffusion3Pipeline": Stock(lambda: pipeline("StableDiffusion3Pipeline"), drawn),
    "FluxPipeline": Stock(flux("FluxPipeline"), calling(**POOLED)),
    "FluxImg2ImgPipeline": Stock(
        flux("FluxImg2ImgPipeline"), calling(**POOLED, image=photo, strength=0.6, num_inference_steps=4)
    ),
    "FluxInpaintPipeline": Stock(
        flux("FluxInpaintPipeline"),
        calling(**POOLED, image=photo, mask_image=mask, strength=0.6, num_inference_steps=4),
    ),
    "FluxKontextPipeline (edit)": Stock(
        flux("FluxKontextPipeline"), calling(**POOLED, image=photo, _auto_resize=False, max_area=64 * 64)
    ),
    "FluxControlNetPipeline": Stock(
        flux("FluxControlNetPipeline", controlnet=flux_controlnet), calling(**POOLED, control_image=photo)
    ),
    "FluxPipeline with an IP-Adapter": Stock(
        flux_with_ip_adapter,
        calling(**POOLED, ip_adapter_image_embeds=lambda: [torch.ones(1, 1, 8)],
                negative_ip_adapter_image_embeds=lambda: [torch.zeros(1, 1, 8)]),
    ),
    "Flux2KleinPipeline": Stock(
        simple("Flux2KleinPipeline", "Flux2Transformer2DModel", flux2_vae, guidance_embeds=False),
        calling(guidance_scale=3.0),
    ),
    "Flux2KleinPipeline (edit)": Stock(
        simple("Flux2KleinPipeline", "Flux2Transformer2DModel", flux2_vae, guidance_embeds=False),
        calling(guidance_scale=3.0, image=picture),
    ),
    "ChromaPipeline": Stock(
        simple("ChromaPipeline", "ChromaTransformer2DModel", autoencoder), calling(masked=True, guidance_scale=3.0)
    ),
    "QwenImagePipeline": Stock(qwen("QwenImagePipeline"), calling(true_cfg_scale=3.0)),
    "QwenImageImg2ImgPipeline": Stock(
        qwen("QwenImageImg2ImgPipeline"), calling(true_cfg_scale=3.0, image=photo, strength=0.6, num_inference_steps=4)
    ),
    "QwenImageInpaintPipeline": Stock(
        qwen("QwenImageInpaintPipeline"),
        calling(true_cfg_scale=3.0, image=photo, mask_image=mask, strength=0.6, num_inference_steps=4),
    ),
    "QwenImageEditPipeline (edit)": Stock(
        qwen("QwenImageEditPipeline", processor=None), edited
    ),
    "QwenImageControlNetPipeline": Stock(
        lambda: qwen("QwenImageControlNetPipeline", controlnet=qwen_controlnet())(),
        calling(true_cfg_scale=3.0, control_image=photo),
    ),
    "ZImagePipeline": Stock(
        simple("ZImagePipeline", "ZImageTransformer2DModel", autoencoder), list_of_texts(guidance_scale=3.0)
    ),
    "Lumina2Pipeline": Stock(
        simple("Lumina2Pipeline", "Lumina2Transformer2DModel", autoencoder), calling(masked=True, guidance_scale=3.0)
    ),
    "WanPipeline": Stock(wan("WanPipeline"), calling(**FRAMES)),
    "WanPipeline with two transformers": Stock(
        wan("WanPipeline", two=True), calling(**FRAMES, num_inference_steps=4)
    ),
    "WanImageToVideoPipeline": Stock(
        wan("WanImageToVideoPipeline", in_channels=12), calling(**FRAMES, image=photo)
    ),
    "WanImageToVideoPipeline with two transformers": Stock(
        wan("WanImageToVideoPipeline", two=True, in_channels=12), calling(**FRAMES, image=photo, num_inference_steps=4)
    ),
    "WanVACEPipeline": Stock(
        wan("WanVACEPipeline", "WanVACETransformer3DModel", vace_in_channels=72), calling(**FRAMES)
    ),
    "CogVideoXPipeline": Stock(
        simple(
            "CogVideoXPipeline", "CogVideoXTransformer3DModel", cog_vae, diffusers.CogVideoXDDIMScheduler,
            attention_head_dim=16,
        ),
        calling(**FRAMES),
    ),
    "HunyuanVideo15Pipeline": Stock(hunyuan, hunyuan_run),
    "LTX2Pipeline": Stock(ltx2, calling(**FRAMES, masked=True), forwards=4),
    "QwenImage21Pipeline": Stock(qwen21, calling(true_cfg_scale=3.0)),
}  # fmt: skip
