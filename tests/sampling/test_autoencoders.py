"""Every kind of diffusers autoencoder through encoding, sampling, scoring, inspection and the pipeline."""

import diffusers
import numpy as np
import pytest
import torch
from conftest import small_vae
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

import elit
from elit.cli.main import main
from elit.data.encode import Encoding, encode, load_encoder
from elit.data.images import LatentSet
from elit.data.source import open_source
from elit.evaluate.chunks import Work
from elit.evaluate.inspect.inspection import load_probe
from elit.evaluate.samples import Sampler
from elit.sampling.autoencoders import (
    LatentNormalization,
    decode,
    downsampling,
    encode_mean,
    encode_moments,
    latent_normalization,
    load_autoencoder,
)

MEAN, STD = [0.3, -0.2, 0.1, 0.5], [1.5, 0.7, 2.0, 0.4]
SCALE = 0.41


def small_wan() -> diffusers.AutoencoderKLWan:
    video = {"z_dim": 4, "dim_mult": [1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [False, True]}
    return diffusers.AutoencoderKLWan(base_dim=8, scale_factor_spatial=4, latents_mean=MEAN, latents_std=STD, **video)


def small_dc() -> diffusers.AutoencoderDC:
    channels = {f"{part}_block_out_channels": (8, 8, 8) for part in ("encoder", "decoder")}
    layers = {f"{part}_layers_per_block": (1, 1, 1) for part in ("encoder", "decoder")}
    kinds = {f"{part}_block_types": "ResBlock" for part in ("encoder", "decoder")}
    scales = {f"{part}_qkv_multiscales": ((), (), ()) for part in ("encoder", "decoder")}
    sizes = channels | layers | kinds | scales
    return diffusers.AutoencoderDC(latent_channels=4, attention_head_dim=4, scaling_factor=SCALE, **sizes)


KINDS = {
    "AutoencoderKL": lambda: small_vae(scaling_factor=SCALE, shift_factor=0.1),
    "AutoencoderKL with statistics": lambda: small_vae(scaling_factor=SCALE, latents_mean=MEAN, latents_std=STD),
    "AutoencoderKLWan": small_wan,
    "AutoencoderDC": small_dc,
}
CELL = {"AutoencoderKL": 2, "AutoencoderKL with statistics": 2}  # 4 of the others


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def vae(kind):
    torch.manual_seed(0)
    return KINDS[kind]().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("autoencoders") / "photos"
    for i in range(6):
        path = root / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return root


@pytest.fixture(scope="module")
def model(kind):
    torch.manual_seed(0)
    sizes = {"sample_size": 16 // CELL.get(kind, 4), "in_channels": 4, "hidden_size": 24, "num_heads": 2, "depth": 3}
    network = elit.create_model("ELIT-DiT-S/1", num_classes=2, split=(1, 1, 1), window=(2, 2), **sizes)
    torch.nn.init.normal_(network.final.linear.weight)
    return network.eval()


def own_latents(vae, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std as the class itself gives them, clips of one frame where it is one for video."""
    if isinstance(vae, diffusers.AutoencoderDC):
        latent = vae.encode(pixels).latent
        return latent, torch.zeros_like(latent)
    video = not isinstance(vae, diffusers.AutoencoderKL)
    posterior = vae.encode(pixels.unsqueeze(2) if video else pixels).latent_dist
    return tuple(each.squeeze(2) if video else each for each in (posterior.mean, posterior.std))


def as_pipelines_do(kind: str, z: torch.Tensor) -> torch.Tensor:
    """The lines of diffusers' own pipelines that normalize latents, written out."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (MEAN, STD))
    if kind == "AutoencoderKL":  # pipeline_flux_img2img
        return (z - 0.1) * SCALE
    if kind == "AutoencoderDC":  # pipeline_sana
        return z * SCALE
    if kind == "AutoencoderKL with statistics":  # pipeline_stable_diffusion_xl_img2img
        return (z - mean) * SCALE / std
    return (z - mean) / std  # pipeline_wan_i2v


def test_latents_are_normalized_as_diffusers_pipelines_do(kind, vae):
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, std = own_latents(vae, pixels)
    ours = encode_moments(vae, pixels)
    torch.testing.assert_close(ours, (mean, std))
    x = encode_mean(vae, pixels)
    torch.testing.assert_close(x, as_pipelines_do(kind, mean))
    offset = as_pipelines_do(kind, mean + std) - as_pipelines_do(kind, mean)
    torch.testing.assert_close(latent_normalization(vae).normalize_std(std), offset, atol=1e-5, rtol=1e-4)
    z = mean.unsqueeze(2) if "Wan" in kind else mean
    right = vae.decode(z).sample
    torch.testing.assert_close(decode(vae, x), right.squeeze(2) if right.ndim == 5 else right, atol=1e-5, rtol=1e-4)
    assert 16 // downsampling(vae) == x.shape[-1]


def test_encoded_sampled_scored_and_looked_at(kind, vae, model, photos, tmp_path):
    vae.save_pretrained(tmp_path / "vae")
    again = load_encoder(str(tmp_path / "vae")), load_autoencoder(tmp_path / "vae", required=True)
    assert all(type(each) is type(vae) for each in again)
    encoding = Encoding(vae=str(tmp_path / "vae"), image_size=16)
    source, out = open_source(photos, captions=False), tmp_path / "latents"
    for _ in range(2):  # a second time compares what is there
        encode(source, out, vae, encoding)
    data = LatentSet(out)
    moments, labels = data.__getitems__(range(6))
    assert data.shape == (4, *model.sample_size)
    examples = load_probe(model, str(photos), 6, vae=vae)
    torch.testing.assert_close(moments[:, 0], examples.x, atol=5e-3, rtol=5e-3)  # kept in float16
    assert labels.tolist() == examples.y.tolist()
    assert main(["encode", "--inspect", str(out)]) == 0

    pipe = elit.ElitPipeline(model, FlowMatchEulerDiscreteScheduler(), vae)
    pipe.set_progress_bar_config(disable=True)
    latents = pipe([0, 1], num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="latent")
    pictures = pipe([0, 1], num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert pictures.shape == (2, 3, 16, 16)
    torch.testing.assert_close(pictures, (decode(vae, latents.images).clamp(-1, 1) + 1) / 2)
    drawn = Sampler(model, Work(out=tmp_path / "sets", chunk=2), vae=vae).make(elit.Sampling(steps=1), 2)
    assert drawn.read(0, 2).shape == (2, 3, 16, 16)
    model.save_pretrained(tmp_path / "model")
    line = ["sample", str(tmp_path / "model"), "--vae", str(tmp_path / "vae"), "--steps", "1"]
    assert main([*line, "--out", str(tmp_path / "x.png")]) == 0


def test_what_is_saved_is_read_again():
    shifted = LatentNormalization(scale=0.5, mean=(0.1,))
    assert shifted.to_json() == {"scaling_factor": 0.5, "shift_factor": 0.1}  # as encode.json always had it
    for normalization in (shifted, LatentNormalization(mean=tuple(MEAN), std=tuple(STD))):
        assert LatentNormalization.from_json(normalization.to_json()) == normalization


def flux2():
    return diffusers.AutoencoderKLFlux2(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (flux2, "scaling_factor, or latents_mean and latents_std, in its config, got 'AutoencoderKLFlux2'"),
        (lambda: small_vae(latents_mean=MEAN), "latents_mean and latents_std, in its config, got 'AutoencoderKL'"),
        (lambda: diffusers.UNet2DModel(block_out_channels=(8,), norm_num_groups=4, down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",)), "an autoencoder with .*, got 'UNet2DModel'"),
    ],
)  # fmt: skip
def test_others_are_refused_by_what_they_lack(build, message, tmp_path):
    vae = build()
    with pytest.raises(ValueError, match=message):
        latent_normalization(vae)
    vae.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_encoder(str(tmp_path))


def test_an_autoencoder_of_other_channels_is_refused_before_it_decodes(tmp_path, capsys):
    small_vae().save_pretrained(tmp_path / "vae")
    assert main(["sample", "fashion", "--vae", str(tmp_path / "vae"), "--out", str(tmp_path / "a.png")]) == 2
    assert "its latents have 4 channels, the network's samples 1" in capsys.readouterr().err
