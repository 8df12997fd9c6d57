"""A stock FluxPipeline small enough to train on a CPU: text to image on captioned digits.

    python examples/tiny_flux/train.py runs/tiny-flux               # 4x4 tokens; a few minutes on one core
    python examples/tiny_flux/train.py runs/small-flux --size 32    # 16x16 tokens in 16 windows of 4x4; eight minutes

Every part is an ordinary one of diffusers or transformers: FluxTransformer2DModel, AutoencoderKL, CLIPTextModel,
T5EncoderModel, FlowMatchEulerDiscreteScheduler. The text encoders keep their random weights: captions have few words,
and what a random network makes of different words differs. OUT is then a folder like any pipeline's:

    pipe = diffusers.FluxPipeline.from_pretrained("runs/tiny-flux")
    pipe("a photo of a seven", height=16, width=16, max_sequence_length=8, num_inference_steps=20)

OUT/prompts.txt has the captions, one a line, for `elit distill --prompts`. OUT/pictures has the pictures with
captions, for `elit distill --data`.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import diffusers
import torch
import torch.nn.functional as F
from captions import DIGITS, SIZE, TEMPLATES, captioned_images, captions
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from elit.sampling.pictures import image_grid, save_frames

TEXT_LENGTH, TEXT_WIDTH = 8, 64


class Settings(NamedTuple):
    """The settings that depend on the size of the pictures."""

    channels: tuple[int, ...]  # of the autoencoder; each but the first halves the sides
    width: int
    sides: tuple[int, ...]  # tokens along a side: the network learns on few large ones first, where steps are cheap
    steps: tuple[int, ...]
    shift: float = 1.0  # of training times and sampling towards noise: many tokens show the same picture


SETTINGS = {SIZE: Settings((16, 32), 96, (4,), (1500,)), 32: Settings((16,), 64, (4, 8, 16), (1500, 300, 300), 3.0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=int, default=SIZE, choices=SETTINGS, help="pixels a side")
    parser.add_argument("--steps", type=int, nargs="+", default=None, help="of each stage")
    parser.add_argument("--autoencoder-steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{str(arguments.out)!r} is there already; give a new folder")
    settings = SETTINGS[arguments.size]
    stages = list(zip(settings.sides, arguments.steps or settings.steps, strict=True))
    torch.manual_seed(arguments.seed)
    pipe = make_pipeline(settings)
    images, labels = captioned_images(arguments.size)
    pictures = [captioned_images(arguments.size * side // settings.sides[-1])[0] for side in settings.sides]
    train_autoencoder(pipe.vae, pictures, steps=arguments.autoencoder_steps)
    train_transformer(pipe, pictures, labels, stages, batch_size=arguments.batch_size)

    temporary = arguments.out.with_name(f".{arguments.out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipe.save_pretrained(temporary)
    (temporary / "prompts.txt").write_text("".join(f"{caption}\n" for caption in captions()), encoding="utf-8")
    save_pictures(images, labels, temporary / "pictures")
    temporary.replace(arguments.out)
    print(f"{arguments.out}: saved")


def save_pictures(images: Tensor, labels: Tensor, folder: Path) -> None:
    """PNG files, and their captions in metadata.jsonl."""
    texts, lines = captions(), []
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        save_frames([image_grid(image[None], 1)], folder / f"{number:04d}.png")
        text = texts[number % len(TEMPLATES) * len(DIGITS) + label]
        lines.append(json.dumps({"file_name": f"{number:04d}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_pipeline(settings: Settings) -> diffusers.FluxPipeline:
    """Stock parts with random weights."""
    tokenizer = make_tokenizer()
    words = len(tokenizer)
    clip = CLIPTextConfig(
        vocab_size=words, hidden_size=TEXT_WIDTH, intermediate_size=2 * TEXT_WIDTH, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=TEXT_LENGTH, projection_dim=TEXT_WIDTH, initializer_factor=4.0,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=words, d_model=TEXT_WIDTH, d_kv=32, d_ff=2 * TEXT_WIDTH, num_layers=2, num_heads=2,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=settings.channels,
        down_block_types=("DownEncoderBlock2D",) * len(settings.channels),
        up_block_types=("UpDecoderBlock2D",) * len(settings.channels),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        shift_factor=0.0,
        sample_size=2 * settings.sides[-1] * 2 ** (len(settings.channels) - 1),
    )
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=settings.width // 32,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 14, 14),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=settings.shift)
    pipe = diffusers.FluxPipeline(
        scheduler, vae, CLIPTextModel(clip), tokenizer, T5EncoderModel(t5), tokenizer, transformer
    )
    pipe.text_encoder.eval().requires_grad_(False)
    pipe.text_encoder_2.eval().requires_grad_(False)
    return pipe


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the captions."""
    words = sorted({word for caption in captions() for word in caption.split()})
    vocabulary = {word: i for i, word in enumerate(["[pad]", "[unk]", "[start]", "[end]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("[start]", vocabulary["[start]"]), ("[end]", vocabulary["[end]"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="[start] $A [end]", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[pad]",
        unk_token="[unk]",
        bos_token="[start]",
        eos_token="[end]",
        model_max_length=TEXT_LENGTH,
    )


def train_autoencoder(vae: diffusers.AutoencoderKL, pictures: list[Tensor], *, steps: int) -> None:
    """Mean squared error and a little KL; the factor that makes latents unit wide ends in its config."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    vae.train()
    for step in range(steps):
        images = pictures[-1 - step % len(pictures)]
        pixels = images[torch.randint(len(images), (64,))]
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * (1 - step / steps)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            restored = vae.decode(posterior.sample()).sample
        loss = F.mse_loss(restored.float(), pixels) + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"autoencoder: step {step + 1:,} of {steps:,}, loss {loss.item():.4f}", flush=True)
    vae.eval()
    latents = encode(vae, pictures[-1][:2048])
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())


@torch.no_grad()
def encode(vae: diffusers.AutoencoderKL, images: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([vae.encode(part).latent_dist.mean.float() for part in images.split(512)])


def train_transformer(
    pipe: diffusers.FluxPipeline,
    pictures: list[Tensor],
    labels: Tensor,
    stages: list[tuple[int, int]],
    *,
    batch_size: int,
) -> None:
    """Rectified flow in Flux's own direction: timestep 1 is noise, the velocity is noise - data.

    stages: tokens along a side, and steps; `pictures` are as large as each needs. A large token has the place of the
    middle of the small ones that it covers.
    """
    config, transformer, last = pipe.vae.config, pipe.transformer, stages[-1][0]
    prompts = ["", *captions()]
    with torch.no_grad():
        texts, pooled, text_ids = pipe.encode_prompt(prompts, max_sequence_length=TEXT_LENGTH)
    optimizer = torch.optim.Adam(transformer.parameters(), lr=2e-3, betas=(0.9, 0.99), fused=True)
    average = diffusers.training_utils.EMAModel(transformer.parameters(), decay=0.995 if len(stages) > 1 else 0.999)
    transformer.train()
    start, done, total = time.process_time(), 0, sum(steps for _, steps in stages)
    for (side, steps), images in zip(stages, pictures, strict=True):
        latents = (encode(pipe.vae, images) - config.shift_factor) * config.scaling_factor
        tokens = F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2).contiguous()  # (M, side², 16), as packed
        places = torch.arange(float(side)) * (last / side) + (last / side - 1) / 2
        rows, columns = torch.meshgrid(places, places, indexing="ij")
        image_ids = torch.stack((torch.zeros(side, side), rows, columns), -1).flatten(0, 1)
        shift = 1 + (pipe.scheduler.config.shift - 1) * side / last
        size = batch_size if side == stages[0][0] else batch_size // 2
        for _ in range(steps):
            row = torch.randint(len(tokens), (size,))
            which = 1 + torch.randint(len(TEMPLATES), (size,)) * len(DIGITS) + labels[row]
            which = which.where(torch.rand(size) > 0.1, 0)
            noise, level = torch.randn(size, *tokens.shape[1:]), torch.sigmoid(torch.randn(size))
            level = shift * level / (1 + (shift - 1) * level)
            weight = level[:, None, None]
            velocity = transformer(
                hidden_states=(1 - weight) * tokens[row] + weight * noise,
                timestep=level,
                encoder_hidden_states=texts[which],
                pooled_projections=pooled[which],
                txt_ids=text_ids,
                img_ids=image_ids,
            ).sample
            loss = F.mse_loss(velocity, noise - tokens[row])
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * min(1.0, (done + 1) / 100) * min(1.0, 2 * (1 - done / total))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
            optimizer.step()
            average.step(transformer.parameters())
            done += 1
            if done % 50 == 0:
                seconds = time.process_time() - start
                print(f"transformer: step {done:,} of {total:,}, loss {loss.item():.4f}, {seconds:.0f} s", flush=True)
    average.copy_to(transformer.parameters())
    transformer.eval()


if __name__ == "__main__":
    main()
