"""elit doctor"""

import os
import platform
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module, metadata, util

import torch

from elit._version import __version__

PACKAGES = ("torch", "diffusers", "accelerate", "safetensors", "scikit-learn", "tyro", "rich", "matplotlib")
EXTRAS = {  # of pyproject.toml, with a package of each that nothing else here brings along
    "eval (torch-fidelity)": "torch_fidelity",
    "text (transformers)": "transformers",
    "lora (peft)": "peft",
    "serve (ray)": "ray",
    "ui (gradio)": "gradio",
    "docs (mkdocs)": "mkdocs",
}


@dataclass(frozen=True, kw_only=True)
class Args:
    """Check this installation: versions, devices and the speed of their dtypes, and known problems with their cures.

    Example: elit doctor
    """

    json: bool = False
    """Print the findings as JSON last on stdout."""


def run(args: Args) -> dict[str, object]:
    versions: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    extras = {name: util.find_spec(module) is not None for name, module in EXTRAS.items()}
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    devices += ["mps"] if torch.backends.mps.is_available() else []
    speeds = {device: _dtype_speeds(device) for device in devices}
    slow = [
        f"{dtype} on {device}"
        for device, each in speeds.items()
        for dtype, speed in each.items()
        if isinstance(speed, float) and isinstance(each["float32"], float) and speed < each["float32"]
    ]
    findings: dict[str, object] = {
        "elit": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "extras": extras,
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "devices": {device: _device_name(device) for device in devices},
        "matmul_gflops": speeds,
        "slower_than_float32": slow,
        "problems": _problems(),
    }
    if not args.json:
        for name, value in findings.items():
            if isinstance(value, dict):
                print(f"{name}:", *(f"  {key}: {_text(each)}" for key, each in value.items()), sep="\n")
            else:
                print(f"{name}: {_text(value)}")
    return findings


def _text(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {each}" for name, each in value.items())
    if isinstance(value, list):
        return "; ".join(value) or "none"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return platform.processor() or platform.machine()


def _dtype_speeds(device: str) -> dict[str, float | str]:
    """GFLOP/s of a square matrix product in each dtype, or the error that it raises."""
    size = 512 if device == "cpu" else 8192  # some CPUs emulate half precision, slowly
    speeds: dict[str, float | str] = {}
    for name in ("float32", "bfloat16", "float16"):
        try:
            a = torch.randn(size, size, device=device).to(getattr(torch, name))
            best = float("inf")
            for _ in range(4):
                start = time.perf_counter()
                float((a @ a)[0, 0])  # reading one number waits for the product
                best = min(best, time.perf_counter() - start)
            speeds[name] = round(2 * size**3 / best / 1e9, 1)
        except RuntimeError as error:
            speeds[name] = str(error).splitlines()[0]
    return speeds


def _problems() -> list[str]:
    if util.find_spec("torchvision"):
        try:
            import_module("torchvision")
        except Exception as error:  # any error here breaks the imports of others in the same way
            return [
                f"torchvision is installed but does not import ({' '.join(str(error).split())}): it was built for "
                "another torch, and transformers and diffusers fail with it. Cure: pip uninstall torchvision, or "
                "install the build that matches this torch"
            ]
    return []
