"""elit doctor"""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module, metadata, util
from typing import Any

from elit._version import __version__
from elit.cli.main import parse as parse_arguments

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
    """What is installed here, which devices and dtypes work and how fast they are, and what is broken and its cure.

    Example: elit doctor
    """

    json: bool = False
    """Print the findings as JSON last on stdout."""


def parse(arguments: Sequence[str]) -> Args:
    return parse_arguments(Args, "doctor", arguments)


def run(args: Args) -> dict[str, Any]:
    import torch

    speeds = {device: _dtype_speeds(device) for device in _devices()}
    findings: dict[str, Any] = {
        "elit": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in PACKAGES},
        "extras": {name: util.find_spec(module) is not None for name, module in EXTRAS.items()},
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "devices": {device: _device_name(device) for device in speeds},
        "matmul_gflops": speeds,
        "problems": _problems(),
    }
    if not args.json:
        _print(findings)
    return findings


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[str]:
    import torch

    devices = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return devices + (["mps"] if torch.backends.mps.is_available() else [])


def _device_name(device: str) -> str:
    import torch

    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    return platform.processor() or platform.machine()


def _dtype_speeds(device: str) -> dict[str, float | str]:
    """GFLOP/s of a square matrix product in each dtype, or why it does not run."""
    import time

    import torch

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
    problems = []
    if util.find_spec("torchvision"):
        try:
            import_module("torchvision")
        except Exception as error:  # whatever it is, it breaks others' imports in the same way
            problems.append(
                f"torchvision is installed but does not import ({' '.join(str(error).split())}): it was built for "
                "another torch, and transformers and diffusers fail with it. Cure: pip uninstall torchvision, or "
                "install the build that matches this torch"
            )
    return problems


def _print(findings: dict[str, Any]) -> None:
    print(f"elit {findings['elit']}, Python {findings['python']}, {findings['platform']}")
    print("packages: " + ", ".join(f"{name} {version or 'missing'}" for name, version in findings["versions"].items()))
    print("extras:   " + ", ".join(f"{name}: {'yes' if here else 'no'}" for name, here in findings["extras"].items()))
    print(f"threads:  {findings['torch_threads']} of {findings['cpu_cores']} cores")
    for device, speeds in findings["matmul_gflops"].items():
        print(f"{device}: {findings['devices'][device]}")
        reference = speeds["float32"]
        for dtype, speed in speeds.items():
            if isinstance(speed, str):
                print(f"  {dtype:9} does not work here: {speed}")
            else:
                ratio = speed / reference if isinstance(reference, float) else 1.0
                verdict = "" if dtype == "float32" else f", {ratio:.1f} × float32" + ("" if ratio > 1 else ": avoid")
                print(f"  {dtype:9} {speed:,.0f} GFLOP/s{verdict}")
    for problem in findings["problems"] or ["none found"]:
        print(f"problems: {problem}")
