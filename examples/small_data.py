"""Real pictures and a stand-in autoencoder, to try docs/training.md with: no download.

    python examples/small_data.py            # writes photos/ (3 classes of 120 images) and vae/ (random weights)

Photos are crops of scikit-learn's two sample photographs, and its digits. An autoencoder of random weights keeps no
picture intact; it stands where FLUX's would.
"""

import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images


def main(count: int = 120) -> None:
    chance = random.Random(0)
    for name, pixels in zip(("temple", "flower"), load_sample_images().images, strict=True):
        photo = Image.fromarray(pixels)
        for i in range(count):
            side = chance.randint(48, 160)
            left, top = chance.randint(0, photo.width - side), chance.randint(0, photo.height - side)
            save(photo.crop((left, top, left + side, top + side)), name, i)
    for i, pixels in enumerate(load_digits().images[:count]):
        save(Image.fromarray((pixels * 15.9).astype(np.uint8)), "digit", i)

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=8,
        scaling_factor=0.5,
    )
    vae.save_pretrained("vae")


def save(image: Image.Image, name: str, number: int) -> None:
    path = Path("photos") / name / f"{number:04d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


if __name__ == "__main__":
    main()
