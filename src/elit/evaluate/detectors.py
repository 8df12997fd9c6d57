"""Networks that turn pictures, or clips, in [-1, 1] into features, in float32; table in docs/evaluate.md."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from elit.compat import inception_network
from elit.config import require
from elit.data.builtin import digits
from elit.data.images import ImageSet
from elit.models.saved import weights_digest
from elit.pretrained import HERE

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DINOV2 = "facebook/dinov2-large"
SPATIAL_CHANNELS = 7  # of the 17×17 map that ADM's sFID reads
FASHION = HERE / "fashion" / "detector" / "classifier.safetensors"
OWN = ("digits", "moving-digits", "fashion-mnist")  # of the data set of that name
KINDS = ("inception", "dinov2", "classifier:FOLDER", "i3d:FILE.pt", "pyramid", *OWN)


class Detection(NamedTuple):
    features: Tensor  # (B, F)
    label: Tensor | None = None  # (B,) int64, the recognised class, by detectors that know classes
    steady: Tensor | None = None  # (B,) bool for clips: every frame shows that class
    logits: Tensor | None = None  # (B, K), for the Inception score
    spatial: Tensor | None = None  # (B, S), features with positions, for sFID


class Detector(ABC):
    """A network that turns samples (B, C, ...) in [-1, 1] into a `Detection`."""

    name: str
    width: int  # F, features of a sample
    offers: tuple[str, ...]  # metrics that can be computed from its detections
    default: tuple[str, ...]  # those computed unless others are wanted
    weights: str  # SHA-256 of its weights
    input: str  # preparation of the pictures, in words

    def describe(self) -> dict[str, str]:
        return {"name": self.name, "weights": self.weights, "input": self.input}

    @abstractmethod
    def __call__(self, samples: Tensor) -> Detection: ...


def open_detector(specification: str, *, device: torch.device | str = "cpu") -> Detector:
    """The detector of a specification, such as `dinov2:FOLDER`. Raises ValueError."""
    kind, _, place = specification.partition(":")
    own = kind in (*OWN, "pyramid")
    valid = kind in DETECTORS and not (own and place) and (bool(place) or kind not in ("classifier", "i3d"))
    require(valid, "detector", specification, f"one of {', '.join(KINDS)}")
    return DETECTORS[kind](place, device)


def default_detector(reference: str) -> str:
    """A named data set's own, Inception where the extra eval is installed, else the pyramid."""
    return reference if reference in OWN else "inception" if find_spec("torch_fidelity") else "pyramid"


class PyramidDetector(Detector):
    """No network: mean colour, and mean |band| of a Laplacian pyramid (Burt, Adelson 1983), in 4×4 fields."""

    name, width, weights = "pyramid", 192, "none"
    offers = ("fd", "kid", "precision", "recall")
    default = ("fd", "precision", "recall")
    input = "64 bicubic, antialiased"

    def __call__(self, samples: Tensor) -> Detection:
        x, levels = resized(rgb(samples, self.name), 64), []
        for weight in (8, 4, 2):  # pictures have the less of a band the finer it is
            low = F.avg_pool2d(x, 2)
            levels.append(weight * (x - F.interpolate(low, scale_factor=2)).abs())
            x = low
        return Detection(torch.cat([F.adaptive_avg_pool2d(level, 4).flatten(1) for level in (*levels, x)], 1))


class InceptionDetector(Detector):
    """TensorFlow's Inception of 2015 as torch-fidelity has ported it, with its resize to 299 pixels."""

    name, width = "inception", 2048
    offers = ("fid", "sfid", "is", "kid", "precision", "recall")
    default = ("fid", "sfid", "is", "precision", "recall")
    input = "299 bilinear as TensorFlow 1, 8-bit RGB"

    def __init__(self, weights: str | None, device: torch.device | str):
        if weights is not None and not Path(weights).is_file():
            raise ValueError(f"cannot load detector inception: no file {weights!r}")
        try:
            self.network, layer = inception_network(weights)
        except (ImportError, RuntimeError) as error:  # a torchvision for another torch raises RuntimeError
            needs = "torch-fidelity (the extra eval), and the torchvision built for this torch"
            raise ValueError(f"cannot load detector inception: it needs {needs} ({error})") from None
        self.network.to(device)
        self.device = torch.device(device)
        self.weights = weights_digest(self.network)
        self.maps: list[Tensor] = []
        layer.register_forward_hook(lambda module, inputs, output: self.maps.append(output))

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> Detection:
        pixels = ((rgb(samples, self.name).to(self.device) + 1) * 127.5).round().to(torch.uint8)
        features, logits = self.network(pixels)
        spatial = self.maps.pop()[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return Detection(features, logits=logits, spatial=spatial)


class TransformersDetector(Detector):
    """A network of transformers on resized pictures, bicubic with antialiasing. name: on the hub, or a folder."""

    kind: str
    size = 224
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __init__(self, name: str, device: torch.device | str):
        try:
            import transformers

            self.network = getattr(transformers, self.kind).from_pretrained(name, dtype=torch.float32)
        except (ImportError, OSError, ValueError) as error:  # the extra text has transformers
            raise ValueError(f"cannot load detector {self.name}:{name}: {str(error).splitlines()[0]}") from None
        self.network.eval().requires_grad_(False).to(device)
        self.weights = weights_digest(self.network)

    def prepared(self, samples: Tensor) -> Tensor:
        x = (resized(rgb(samples, self.name).to(self.network.device), self.size) + 1) / 2
        mean, std = (torch.tensor(values, device=x.device).view(-1, 1, 1) for values in (self.mean, self.std))
        return (x - mean) / std


class DinoDetector(TransformersDetector):
    """DINOv2's class token after the last norm, as Stein et al. 2023 take it (flaws of generative model metrics)."""

    name, kind = "dinov2", "Dinov2Model"
    offers = ("fdd", "kid", "precision", "recall")
    default = ("fdd",)
    input = "224 bicubic, antialiased, ImageNet's mean and std"

    def __init__(self, name: str, device: torch.device | str):
        super().__init__(name, device)
        self.width = self.network.config.hidden_size

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> Detection:
        return Detection(self.network(self.prepared(samples)).last_hidden_state[:, 0])


class ClassifierDetector(TransformersDetector):
    """An image classifier, whose class k is taken for the network's; its features are its logits."""

    name, kind = "classifier", "AutoModelForImageClassification"
    offers = ("accuracy", "is")
    default = ("accuracy",)

    def __init__(self, name: str, device: torch.device | str):
        super().__init__(name, device)
        self.width = self.network.config.num_labels
        path = Path(name) / "preprocessor_config.json"
        settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        side = settings.get("crop_size") or settings.get("size") or {}
        self.size = (side if isinstance(side, int) else side.get("height") or side.get("shortest_edge")) or 224
        self.mean = tuple(settings.get("image_mean") or IMAGENET_MEAN)
        self.std = tuple(settings.get("image_std") or IMAGENET_STD)
        self.input = f"{self.size} bicubic, antialiased, mean {self.mean}, std {self.std}"

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> Detection:
        logits = self.network(self.prepared(samples)).logits
        return Detection(logits, label=logits.argmax(1), logits=logits)


class I3DDetector(Detector):
    """I3D as a TorchScript file (a program: give one you trust); features (B, 400) before the softmax."""

    name, width = "i3d", 400
    offers = ("fvd", "kid", "precision", "recall")
    default = ("fvd",)
    input = "[-1, 1], the module's own resize"

    def __init__(self, path: Path, device: torch.device | str):
        try:
            self.network = torch.jit.load(path, map_location=device).eval()
        except (RuntimeError, ValueError) as error:  # a missing file is a ValueError
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"cannot load detector i3d: {str(path)!r} is not a TorchScript file ({reason})") from None
        self.device = torch.device(device)
        self.weights = hashlib.sha256(path.read_bytes()).hexdigest()

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> Detection:
        clips = rgb(samples, self.name, clips=True).to(self.device)
        return Detection(self.network(clips, rescale=False, resize=True, return_features=True))


def rgb(samples: Tensor, name: str, *, clips: bool = False) -> Tensor:
    """Three channels from one or three."""
    if samples.ndim != 4 + clips:
        raise ValueError(f"detector {name} takes {'clips' if clips else 'pictures'}, got {tuple(samples.shape)}")
    return samples.expand(-1, 3, *samples.shape[2:])


def resized(samples: Tensor, size: int) -> Tensor:
    x = F.interpolate(samples.float(), (size, size), mode="bicubic", antialias=True, align_corners=False)
    return x.clamp(-1, 1)


class Classifier(nn.Module):
    """A small network whose features are the units before its last layer."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.body, self.head = body, nn.Linear(64, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (B, C, H, W) in [-1, 1] -> features (B, F), logits (B, classes)."""
        features = self.body(images)
        return features, self.head(features)


def digit_classifier() -> Classifier:
    convolutions = nn.Conv2d(1, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 48, 3, padding=1, stride=2), nn.ReLU()
    return Classifier(nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(48 * 16, 64), nn.ReLU()))


def picture_classifier() -> Classifier:
    stages: list[nn.Module] = []
    for before, width in ((1, 32), (32, 64), (64, 128)):
        stages += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    stages += [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128 * 4, 64), nn.ReLU()]
    return Classifier(nn.Sequential(*stages))


class ImageDetector(Detector):
    """A classifier of grey pictures of its own size; of more channels the first counts. Subclasses name another."""

    name, size = "digits", 8
    offers = ("fd", "accuracy", "is", "kid", "precision", "recall")
    default = ("fd", "accuracy", "precision", "recall")

    def __init__(self, classifier: Classifier):
        self.classifier, self.width = classifier, classifier.head.in_features
        self.weights, self.input = weights_digest(classifier), f"{self.size}×{self.size} grey"

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> Detection:
        if samples.shape[2:] != (self.size, self.size):
            raise ValueError(f"detector {self.name} takes {self.size}×{self.size} pictures, got {tuple(samples.shape)}")
        images = samples[:, :1].to(next(self.classifier.parameters()).device)
        features, logits = self.classifier(images)
        return Detection(features, logits.argmax(1), logits=logits)


class FashionDetector(ImageDetector):
    name, size = "fashion-mnist", 32

    def __init__(self, weights: Path = FASHION, device: torch.device | str = "cpu"):
        classifier = picture_classifier()
        classifier.load_state_dict(load_file(weights))
        super().__init__(classifier.eval().requires_grad_(False).to(device))


class ClipDetector(ImageDetector):
    """Clips (B, 1, T, H, W): each frame cut out around its digit; features and class are the mean over the frames."""

    name = "moving-digits"
    offers = (*ImageDetector.offers, "steady")
    default = (*ImageDetector.default, "steady")

    @torch.no_grad()
    def __call__(self, samples: Tensor) -> Detection:
        if samples.ndim != 5:
            raise ValueError(f"detector moving-digits takes clips, got {tuple(samples.shape)}")
        frames = samples[:, :1].transpose(1, 2).flatten(0, 1)  # (B·T, 1, H, W)
        features, logits = (part.unflatten(0, (len(samples), -1)) for part in self.classifier(centred(frames)))
        p = logits.softmax(-1).mean(1)
        label = p.argmax(1)
        return Detection(features.mean(1), label, (logits.argmax(-1) == label[:, None]).all(1), logits=p.log())


class TrainedClassifier(NamedTuple):
    model: Classifier
    accuracy: float  # on the images it was not trained on
    held_out: int  # number of those images


def train_digit_classifier(data: ImageSet, *, epochs: int = 25, seed: int = 0) -> TrainedClassifier:
    """Trains on four fifths of the digits and scores itself on the last fifth; a few seconds."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data), generator=generator)
    held_out, training = order[: len(order) // 5], order[len(order) // 5 :]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = digit_classifier()
    batch_size = 64
    steps = epochs * len(training) // batch_size
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        batch = training[torch.randint(len(training), (batch_size,), generator=generator)]
        images, labels = data.__getitems__(batch.tolist())
        images = images + 0.1 * torch.randn(images.shape, generator=generator)
        loss = F.cross_entropy(model(images)[1], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    images, labels = data.__getitems__(held_out.tolist())
    with torch.no_grad():
        right = model.eval()(images)[1].argmax(1) == labels
    return TrainedClassifier(model, right.float().mean().item(), len(held_out))


@cache
def _digit_classifier(*, cut_out: bool) -> Classifier:
    data = digits()
    return train_digit_classifier(ImageSet(centred(data.images), data.labels, data.classes) if cut_out else data).model


def centred(images: Tensor, size: int = 8) -> Tensor:
    """Windows (B, 1, size, size) around the centre of mass of bright ink on -1, from images (B, 1, H, W)."""
    ink = (images[:, 0] + 1).clamp(min=0).square()  # squared: faint noise far away should not pull
    mass = ink.sum((1, 2)).clamp(min=1e-6)
    corner = []
    for axis in (1, 2):
        place = torch.arange(images.shape[axis + 1], device=images.device, dtype=ink.dtype)
        centre = (ink.sum(3 - axis) * place).sum(1) / mass
        corner.append((centre - (size - 1) / 2).round().long() + size)  # + size for the padding
    rows, columns = (first[:, None] + torch.arange(size, device=images.device) for first in corner)
    padded = F.pad(images[:, 0], (size,) * 4, value=-1.0)
    return padded[torch.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None]][:, None]


DETECTORS: dict[str, Callable[[str, torch.device | str], Detector]] = {
    "inception": lambda weights, device: InceptionDetector(weights or None, device),
    "dinov2": lambda name, device: DinoDetector(name or DINOV2, device),
    "classifier": ClassifierDetector,
    "i3d": lambda path, device: I3DDetector(Path(path), device),
    "pyramid": lambda _, device: PyramidDetector(),
    "digits": lambda _, device: ImageDetector(_digit_classifier(cut_out=False)),
    "moving-digits": lambda _, device: ClipDetector(_digit_classifier(cut_out=True)),
    "fashion-mnist": lambda _, device: FashionDetector(device=device),
}
"""By kind: what is behind the colon of a specification, and the device -> a detector. Others may add their own."""
