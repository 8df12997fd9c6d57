"""elit doctor"""

import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module, metadata, util

import torch

from elit._version import __version__
from elit.cli.main import Command
from elit.files import Json

PACKAGES = (
    *("torch", "diffusers", "accelerate", "safetensors", "scikit-learn", "tyro", "rich", "matplotlib"),
    *("torch-fidelity", "transformers", "peft", "ray", "gradio", "mkdocs"),  # of extras
)


@dataclass(frozen=True, kw_only=True)
class Args(Command):
    """Check this installation: versions, devices, optional packages, and known problems with their cures.

    Example: elit doctor
    """


def run(args: Args) -> Json:
    versions: dict[str, str] = dict.fromkeys(PACKAGES, "not installed")
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    problems: Json = {}  # by package, with a cure
    if util.find_spec("torchvision"):
        try:
            import_module("torchvision")
        except Exception as error:  # any error here breaks the imports of others in the same way
            reason = " ".join(str(error).split())
            cure = "pip uninstall torchvision, or install the build that matches this torch"
            fault = f"does not import ({reason}), and transformers and diffusers fail with it; {cure}"
            problems["torchvision"] = fault
    devices = {f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    findings: Json = {
        "elit": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "devices": {"cpu": f"{os.cpu_count()} cores, {torch.get_num_threads()} threads of torch", **devices},
        "problems": problems,
    }
    if not args.json:
        for name, value in findings.items():
            print(f"{name}: {value}" if isinstance(value, str) else f"{name}:{'' if value else ' none'}")
            for each in value.items() if isinstance(value, dict) else ():
                print("  {}: {}".format(*each))
    return findings
