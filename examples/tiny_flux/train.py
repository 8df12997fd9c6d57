"""A stock FluxPipeline small enough to train on a CPU: text to image on captioned digits.

    python examples/tiny_flux/train.py runs/tiny-flux      # a few minutes on one core

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

import diffusers
import torch
import torch.nn.functional as F
from captions import NAMES, SIZE, TEMPLATES, captioned_images, captions
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from elit.sampling.pictures import image_grid, save_frames

TEXT_LENGTH, WIDTH, TEXT_WIDTH = 8, 96, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--autoencoder-steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{str(arguments.out)!r} is there already; give a new folder")
    torch.manual_seed(arguments.seed)
    pipe = make_pipeline()
    images, labels = captioned_images()
    train_autoencoder(pipe.vae, images, steps=arguments.autoencoder_steps)
    train_transformer(pipe, images, labels, steps=arguments.steps, batch_size=arguments.batch_size)

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
        text = texts[number % len(TEMPLATES) * len(NAMES) + label]
        lines.append(json.dumps({"file_name": f"{number:04d}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def make_pipeline() -> diffusers.FluxPipeline:
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
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        shift_factor=0.0,
        sample_size=SIZE,
    )
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=WIDTH // 32,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 14, 14),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
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


def train_autoencoder(vae: diffusers.AutoencoderKL, images: Tensor, *, steps: int) -> None:
    """Mean squared error and a little KL; the factor that makes latents unit wide ends in its config."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    vae.train()
    for step in range(steps):
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
    latents = encode(vae, images[:2048])
    vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())


@torch.no_grad()
def encode(vae: diffusers.AutoencoderKL, images: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([vae.encode(part).latent_dist.mean.float() for part in images.split(512)])


def train_transformer(
    pipe: diffusers.FluxPipeline, images: Tensor, labels: Tensor, *, steps: int, batch_size: int
) -> None:
    """Rectified flow in Flux's own direction: timestep 1 is noise, the velocity is noise - data."""
    config, transformer = pipe.vae.config, pipe.transformer
    latents = (encode(pipe.vae, images) - config.shift_factor) * config.scaling_factor
    tokens = F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2).contiguous()  # (M, 16, 16), as the pipeline packs
    prompts = ["", *captions()]
    with torch.no_grad():
        texts, pooled, text_ids = pipe.encode_prompt(prompts, max_sequence_length=TEXT_LENGTH)
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    image_ids = torch.stack((torch.zeros(4, 4), rows, columns), -1).flatten(0, 1)
    optimizer = torch.optim.Adam(transformer.parameters(), lr=2e-3, betas=(0.9, 0.99), fused=True)
    average = diffusers.training_utils.EMAModel(transformer.parameters(), decay=0.999)
    transformer.train()
    start = time.process_time()
    for step in range(steps):
        row = torch.randint(len(tokens), (batch_size,))
        which = 1 + torch.randint(len(TEMPLATES), (batch_size,)) * len(NAMES) + labels[row]
        which = which.where(torch.rand(batch_size) > 0.1, 0)
        noise, level = torch.randn(batch_size, *tokens.shape[1:]), torch.sigmoid(torch.randn(batch_size))
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
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 100) * min(1.0, 2 * (1 - step / steps))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimizer.step()
        average.step(transformer.parameters())
        if (step + 1) % 50 == 0:
            seconds = time.process_time() - start
            print(f"transformer: step {step + 1:,} of {steps:,}, loss {loss.item():.4f}, {seconds:.0f} s", flush=True)
    average.copy_to(transformer.parameters())
    transformer.eval()


if __name__ == "__main__":
    main()
