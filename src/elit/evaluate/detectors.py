"""The detectors that the field's figures are made with, each by a specification "KIND" or "KIND:PATH".

    inception[:WEIGHTS.pth]      FID, sFID, IS: torch-fidelity's port of TensorFlow's Inception (extra `eval`)
    dinov2[:NAME or FOLDER]      FDD: DINOv2 ViT-L/14 through transformers (extra `text`)
    classifier:NAME or FOLDER    class accuracy: any image classifier of transformers
    i3d:FILE.pt                  FVD: the TorchScript I3D that the field shares (i3d_torchscript.pt)
    digits, moving-digits        a small classifier trained here in seconds, to try things with

All take pictures (B, 1 or 3, H, W), or clips (B, 1 or 3, T, H, W), in [-1, 1], and work in float32.
"""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from elit.compat import inception_network
from elit.data.digits import digits
from elit.data.images import ImageSet
from elit.evaluate.fashion_mnist import FashionDetector
from elit.evaluate.features import (
    ClipDetector,
    Detection,
    Detector,
    DigitClassifier,
    ImageDetector,
    centred,
    train_digit_classifier,
)
from elit.models.saved import weights_digest

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINOV2 = "facebook/dinov2-large"
SPATIAL_CHANNELS = 7  # of the 17×17 map that ADM's sFID reads
KINDS = ("inception", "dinov2", "classifier:FOLDER", "i3d:FILE.pt", "digits", "moving-digits", "fashion-mnist")


def open_detector(specification: str, *, device: torch.device | str = "cpu") -> Detector:
    """The detector that a specification names; see the top of this file. Raises ValueError."""
    kind, _, place = specification.partition(":")
    if kind == "inception":
        return InceptionDetector(place or None, device)
    if kind == "dinov2":
        return DinoDetector(place or DINOV2, device)
    if kind == "classifier" and place:
        return ClassifierDetector(place, device)
    if kind == "i3d" and place:
        return I3DDetector(Path(place), device)
    if specification == "digits":
        return ImageDetector(_digit_classifier(False))
    if specification == "moving-digits":
        return ClipDetector(_digit_classifier(True))
    if specification == "fashion-mnist":
        return FashionDetector(device=device)
    raise ValueError(f"detector={specification!r}: give one of {', '.join(KINDS)}")


class InceptionDetector(Detector):
    """TensorFlow's Inception of 2015 as torch-fidelity has ported it, with its resize to 299 pixels.

    features (B, 2048) before the last layer, logits (B, 1008) without its bias, spatial (B, 2023): the first 7 channels
    of "mixed_6/conv", rows and columns first, as ADM's evaluator reads them.
    weights: a file of torch-fidelity's; by default it downloads them. Raises ValueError where it cannot be imported.
    """

    name, distance, width = "inception", "fid", 2048
    offers = ("fid", "sfid", "is", "kid", "precision", "recall")
    default = ("fid", "sfid", "is", "precision", "recall")
    input = "299 bilinear as TensorFlow 1, 8-bit RGB"

    def __init__(self, weights: str | None, device: torch.device | str):
        if weights is not None and not Path(weights).is_file():
            raise ValueError(f"detector: {weights!r}: no such file")
        try:
            self.network, layer = inception_network(weights)
        except (ImportError, RuntimeError) as error:  # a torchvision for another torch raises RuntimeError
            raise ValueError(
                f"detector='inception': needs torch-fidelity and the torchvision built for this torch "
                f"({' '.join(str(error).split())}); pip install 'elit-diffusion[eval]', or take dinov2"
            ) from None
        self.network.to(device)
        self.device = torch.device(device)
        self.weights = weights_digest(self.network)
        self.spatial: Tensor | None = None
        layer.register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module: Any, inputs: Any, output: Tensor) -> None:
        self.spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> Detection:
        pixels = ((rgb(samples, self.name).to(self.device) + 1) * 127.5).round().to(torch.uint8)
        features, logits = self.network(pixels)
        return Detection(features, logits=logits, spatial=self.spatial)


class DinoDetector(Detector):
    """DINOv2 through transformers: features (B, F) are the class token after the last norm, 1024 for ViT-L/14.

    Pictures are resized to 224×224, bicubic with antialiasing, and normalised as ImageNet: Stein et al. 2023, "Exposing
    flaws of generative model evaluation metrics". name: on the hub, or a folder. Raises ValueError.
    """

    name, distance = "dinov2", "fdd"
    offers = ("fdd", "kid", "precision", "recall")
    default = ("fdd",)
    size = 224
    input = f"{size} bicubic, antialiased, ImageNet's mean and std"

    def __init__(self, name: str, device: torch.device | str):
        self.network = _from_transformers("Dinov2Model", name, "dinov2").to(device)
        self.width = self.network.config.hidden_size
        self.weights = weights_digest(self.network)

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> Detection:
        x = resized(rgb(samples, self.name).to(self.network.device), self.size)
        return Detection(self.network(normalised(x, IMAGENET_MEAN, IMAGENET_STD)).last_hidden_state[:, 0])


class ClassifierDetector(Detector):
    """An image classifier of transformers, for the share of samples it gives the class asked for.

    Size, mean and std come from its preprocessor_config.json where there is one, else 224 pixels and ImageNet's; its
    class k is taken for the network's class k. Its features are its logits. name: on the hub, or a folder.
    """

    name, distance = "classifier", "fd"
    offers = ("accuracy", "is")
    default = ("accuracy",)

    def __init__(self, name: str, device: torch.device | str):
        self.network = _from_transformers("AutoModelForImageClassification", name, "classifier").to(device)
        self.width = self.network.config.num_labels
        self.weights = weights_digest(self.network)
        path = Path(name) / "preprocessor_config.json"
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self.size = _side(settings.get("crop_size") or settings.get("size") or {}) or 224
        self.mean = tuple(settings.get("image_mean") or IMAGENET_MEAN)
        self.std = tuple(settings.get("image_std") or IMAGENET_STD)
        self.input = f"{self.size} bicubic, antialiased, mean {self.mean}, std {self.std}"

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> Detection:
        x = resized(rgb(samples, self.name).to(self.network.device), self.size)
        logits = self.network(normalised(x, self.mean, self.std)).logits
        return Detection(logits, label=logits.argmax(1), logits=logits)


class I3DDetector(Detector):
    """I3D as a TorchScript file, the way published FVDs are made: features (B, 400) before the softmax.

    It is called as StyleGAN-V's metrics call it, module(clips, rescale=False, resize=True, return_features=True) on
    clips (B, 3, T, H, W) in [-1, 1]. A TorchScript file is a program: give one you trust. Raises ValueError.
    """

    name, distance = "i3d", "fvd"
    offers = ("fvd", "kid", "precision", "recall")
    default = ("fvd",)
    width = 400
    input = "[-1, 1], the module's own resize"

    def __init__(self, path: Path, device: torch.device | str):
        if not path.is_file():
            raise ValueError(f"detector: {str(path)!r}: no such file; I3D is given as i3d:FILE.pt")
        try:
            self.network = torch.jit.load(path, map_location=device).eval()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"detector: {str(path)!r} is no TorchScript file ({reason})") from None
        self.device = torch.device(device)
        self.weights = hashlib.sha256(path.read_bytes()).hexdigest()

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> Detection:
        clips = rgb(samples, self.name, clips=True).to(self.device)
        return Detection(self.network(clips, rescale=False, resize=True, return_features=True))


def rgb(samples: Tensor, name: str, *, clips: bool = False) -> Tensor:
    """Three channels from one or three. Raises ValueError for clips where pictures are wanted, or the other way."""
    if samples.ndim != 4 + clips:
        wanted, given = ("clips", "pictures") if clips else ("pictures", "clips")
        raise ValueError(f"detector={name!r}: takes {wanted}; these are {given}")
    return samples.expand(-1, 3, *samples.shape[2:])


def resized(samples: Tensor, size: int) -> Tensor:
    """(B, 3, size, size), bicubic with antialiasing, kept in [-1, 1]."""
    x = F.interpolate(samples.float(), (size, size), mode="bicubic", antialias=True, align_corners=False)
    return x.clamp(-1, 1)


def normalised(samples: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """[-1, 1] -> [0, 1], less the mean, over the standard deviation of each channel."""
    m, s = (torch.tensor(values, device=samples.device).view(-1, 1, 1) for values in (mean, std))
    return ((samples + 1) / 2 - m) / s


@cache
def _digit_classifier(cut_out: bool) -> DigitClassifier:
    """Trained on the digits as they are, or as `ClipDetector` cuts them out of a frame."""
    data = digits()
    return train_digit_classifier(ImageSet(centred(data.images), data.labels, data.classes) if cut_out else data).model


def _side(size: Any) -> int | None:
    if isinstance(size, int):
        return size
    return size.get("height") or size.get("shortest_edge")


def _from_transformers(kind: str, name: str, detector: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"detector={detector!r}: needs transformers ({error}); pip install 'elit-diffusion[text]'"
        ) from None
    try:
        network = getattr(transformers, kind).from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"detector={detector}:{name}: cannot be loaded ({reason}); give a name or a folder") from None
    return network.eval().requires_grad_(False)
