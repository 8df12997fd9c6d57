"""Where draws are made: a small model of every kind and small data, so that every command and function really runs."""

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from released_files import ELIT, checkpoint

import elit
from elit.cli.main import main
from elit.evaluate.detectors import open_detector
from elit.evaluate.pictures import open_pictures
from elit.models.saved import save_model

SIZES = {"sample_size": 8, "in_channels": 1, "num_classes": 10, "hidden_size": 8, "num_heads": 1, "depth": 3}
NAMES = [*("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")]
TEXT = {"text_features": 8, "pooled_features": 8, "text_length": 8}


def tiny(name: str = "ELIT-DiT-S/1", **changes: Any) -> Any:
    torch.manual_seed(0)
    interface = {"split": (1, 1, 1), "window": (2, 2)} if name.startswith("ELIT") else {}
    sizes = {key: value for key, value in SIZES.items() if key != "num_classes" or "MM-" not in name}
    return elit.create_model(name, **sizes | interface | changes).eval()


class Place:
    """Folders of fixtures, an empty folder to draw in, and the networks that functions are called with.

    A draw may write into `work`, and a command into its model's folder; `restore` takes that away again.
    """

    def __init__(self, folder: Path):
        self.fixtures, self.work = folder / "fixtures", folder / "work"
        self.fixtures.mkdir()
        self.work.mkdir()
        self.networks()
        self._models()
        self._data()
        self._made_by_commands()
        self.detector = open_detector("digits")
        self.pictures = open_pictures(self.fixtures / "pictures", None)
        self.before = self._state()
        self.spare = shutil.copytree(self.fixtures, folder / "spare", symlinks=True)

    def networks(self) -> None:
        """One of every kind, and what a forward takes."""
        self.model, self.plain, self.text = tiny(), tiny("DiT-S/1"), tiny("ELIT-MM-DiT-S/1", **TEXT)
        self.elastic = elit.elastify(tiny("DiT-S/1"), read_after=1, write_after=2, window=(4, 4))
        self.inputs = {"x": torch.zeros(2, 1, 8, 8), "t": torch.zeros(2), "y": torch.tensor([0, 1])}

    def __getitem__(self, name: str) -> str:
        return str(self.fixtures / name)

    def _models(self) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        save_model(tiny(class_names=NAMES), self.fixtures / "model")
        save_model(self.plain, self.fixtures / "plain")
        save_model(self.text, self.fixtures / "text")
        save_model(tiny("ELIT-DiT-S/2-Video", sample_size=(2, 8, 8), window=(1, 2, 2)), self.fixtures / "video")
        save_model(self.elastic, self.fixtures / "elastic")
        vae = small_vae()
        vae.save_pretrained(self.fixtures / "vae")
        latents = tiny(in_channels=4)
        elit.ElitPipeline(latents, FlowMatchEulerDiscreteScheduler(), vae=vae).save_pretrained(self.fixtures / "pipe")
        stock_pipeline(vae).save_pretrained(self.fixtures / "stock")

    def _data(self) -> None:
        for number, name in enumerate(("cats", "dogs")):
            for i in range(3):
                pixels = np.full((8, 8, 3), 40 * number + 20 * i, np.uint8)
                (self.fixtures / "pictures" / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(self.fixtures / "pictures" / name / f"{i}.png")
        for name, text in FILES.items():
            (self.fixtures / name).write_text(text)
        torch.save(checkpoint(ELIT | {"width": 16}), self.fixtures / "released.pt")
        torch.save({"weights": torch.zeros(2)}, self.fixtures / "other.pt")
        shutil.copytree(self.fixtures / "model", self.fixtures / "cut")
        weights = next((self.fixtures / "cut").glob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:100])
        (self.fixtures / "empty").mkdir()
        (self.fixtures / "itself").symlink_to("itself")
        Image.new("L", (8, 8)).save(self.fixtures / "plain.png")

    def _made_by_commands(self) -> None:
        place = self.__getitem__
        statistics, detector = place("statistics.safetensors"), ("--detector", "digits")
        scored = (*detector, "--steps", "1", "--budgets", "100%", "1", "--count", "4", "--out", place("sweep"))
        lines = [
            ["sample", place("model"), "--labels", "3", "--steps", "1", "--out", place("made.png")],
            ["encode", place("pictures"), place("latents"), "--vae", place("vae"), "--image-size", "8"],
            ["profile", place("model"), "--seconds", "0", "--batch-sizes", "1"],
            ["evaluate", place("pictures"), *detector, "--save-reference", statistics, "--out", place("scores")],
            ["sweep", place("model"), "--reference", statistics, *scored],
        ]
        for line in lines:
            assert main(line) == 0, line
        profile = next((self.fixtures / "model").glob("profile-*.json"))
        shutil.copy(profile, self.fixtures / "profile.json")

    def _state(self) -> dict[str, tuple[int, int]]:
        state, folders = {}, [str(self.fixtures)]
        for folder in folders:  # which grows; pathlib's own walk takes five times as long, and it is done twice a draw
            for entry in os.scandir(folder):
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                else:
                    stat = entry.stat(follow_symlinks=False)
                    state[entry.path] = (stat.st_size, stat.st_mtime_ns)
        return state

    def changed(self) -> list[str]:
        """What lies in `work`, and what is no longer in the fixtures as it was."""
        now = self._state()
        others = [name for name in {*now, *self.before} if now.get(name) != self.before.get(name)]
        return [str(path.relative_to(self.work)) for path in self.work.rglob("*")] + others

    def restore(self) -> None:
        if self._state() != self.before:
            shutil.rmtree(self.fixtures)
            shutil.copytree(self.spare, self.fixtures, symlinks=True)
        for path in self.work.iterdir():  # the folder itself is the one that commands run in
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


FILES = {
    "prompts.txt": "7\n8\n",
    "trace.jsonl": '{"at": 0}\n{"at": 0.01}\n',
    "wrong.jsonl": '{"at": "x"}\n',
    "config.yaml": "model:\n  name: ELIT-DiT-S/1\n  hidden_size: 8\n  num_heads: 1\n  depth: 3\n  split: [1, 1, 1]\n"
    "  window: [2, 2]\nsteps: 1\nbatch_size: 2\n",
    "wrong.yaml": "model: 3\nsteps: [",
    "unknown.yaml": "stepps: 3\n",
    "wrong.json": json.dumps({"cost": 3}),
    "wrong.safetensors": "x" * 20,
}
"""Written as they are."""


def small_vae() -> Any:
    """Of random weights, with 4 channels and cells of one pixel."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=2, layers_per_block=1).eval()


def stock_pipeline(vae: Any) -> Any:
    """diffusers' own DiTPipeline of tiny parts."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        **{"num_attention_heads": 1, "attention_head_dim": 8, "sample_size": 8, "in_channels": 4, "out_channels": 8},
        **{"num_layers": 3, "num_embeds_ada_norm": 1000, "patch_size": 2},
    )
    return DiTPipeline(transformer, vae, DDIMScheduler())


@contextlib.contextmanager
def quick() -> Any:
    """What would listen, train for minutes or measure for seconds is left out; all before and after it runs."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    from elit.evaluate.detectors import train_digit_classifier
    from elit.planner.profile import time_runs

    with contextlib.ExitStack() as stack:
        for target, value in (
            ("elit.cli.quickstart.train", stop),
            ("elit.planner.profile.HELD_OUT", 2),
            ("elit.planner.profile.MIN_ROUNDS", 1),
            ("elit.planner.profile.time_runs", lambda *args, **given: time_runs(*args, **given | {"seconds": 0.0})),
            ("elit.play.server.serve", lambda page, host, port, line, address=None: print(line)),
            ("elit.serve.server.start", lambda *_: "http://127.0.0.1:8000"),
            ("elit.serve.server.stop", lambda *_: 0),
            ("elit.serve.server.StopSignal.listen", lambda _: None),
            ("elit.serve.server.StopSignal.wait", lambda _: None),
            ("torch.compile", lambda module, **_: module),
        ):
            stack.enter_context(mock.patch(target, value))
        assert train_digit_classifier.__kwdefaults__ is not None
        stack.enter_context(mock.patch.dict(train_digit_classifier.__kwdefaults__, {"epochs": 1}))
        yield
