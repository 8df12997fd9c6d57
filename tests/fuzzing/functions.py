"""Draws of calls: every public function with arguments that are right, some of them changed to anything."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from fuzzing.place import SIZES, TEXT, Place, tiny
from fuzzing.values import ANYTHING, BIG
from hypothesis import strategies as st

import elit
from elit.budgets import budget_block
from elit.evaluate.detectors import open_detector
from elit.evaluate.inspect.attention import Probe, losses
from elit.evaluate.inspect.inspection import load_examples
from elit.evaluate.reference import open_reference
from elit.evaluate.samples import Sampler
from elit.evaluate.score import score

WORK = {"steps", "num_inference_steps", "sample_size", "batch", "height", "width", "num_images_per_prompt", "draws"}
WORK |= {"count", "image_size", "chunk", "hidden_size", "in_channels", "depth", "num_classes", "num_latents", "length"}
WORK |= {"text_features", "text_length", "pooled_features", "batch_size", "patch_size", "num_heads", "mlp_ratio"}
"""Of which large ones are right, and take long or much memory."""
SAMPLE = (
    *("model", "y", "steps", "budget", "step_budgets", "sample_budgets", "guidance", "solver", "seed", "shift"),
    *("sample_size", "noise", "batch_size", "progress", "cache", "dtype", "plan", "compile", "on_step"),
)
CALL = (
    *("class_labels", "num_inference_steps", "guidance_scale", "budget", "guidance_budget", "generator", "output_type"),
    *("latents", "return_dict", "prompt", "prompt_embeds", "cache", "dtype", "plan", "step_budgets", "sample_budgets"),
    *(
        "compile",
        "height",
        "width",
        "num_images_per_prompt",
        "callback_on_step_end",
        "callback_on_step_end_tensor_inputs",
    ),
)
Call = tuple[Callable[..., Any], dict[str, Any], tuple[str, ...]]
"""A function, arguments that are right, and the names of those to be drawn."""


class Other(torch.nn.Module):
    """A class that no family is of."""


def enter(**given: Any) -> None:
    with elit.budget(**given):
        pass


def functions(place: Place) -> dict[str, Call]:
    """Every public function, and those that the documentation calls, by name."""
    sizes = {**SIZES, "interface": {"split": (1, 1, 1), "window": (2, 2), "num_latents": 4}}
    more = ("patch_size", "mlp_ratio", "class_names", "convention")
    names = {name: (*sizes, *more[: 4 if name == "SiT" else 3]) for name in ("DiT", "UViT", "HDiT", "SiT")}
    networks = {name: (getattr(elit, name), dict(sizes), names[name]) for name in names}
    text = {key: value for key, value in sizes.items() if key != "num_classes"} | TEXT
    elastic = {"read_after": 1, "write_after": 2, "window": (4, 4)}
    pipe = elit.ElitPipeline(place.model, FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    return {
        **networks,
        "MMDiT": (elit.MMDiT, text, (*text, "patch_size", "mlp_ratio", "text_encoder")),
        "sample": (elit.sample, {"model": place.model, "y": [0, 1], "steps": 1}, SAMPLE),
        "sample text": (elit.sample, {"model": place.text, "y": ["a"], "steps": 1}, SAMPLE),
        "sample plan": (elit.sample, {"model": place.model, "y": [0], "plan": elit.Plan(steps=1, budget=1)}, SAMPLE),
        "forward": (place.model, dict(place.inputs), ("x", "t", "y", "budget", "branch_budgets", "shared")),
        "text forward": (place.text, place.inputs | {"y": place.text.example_condition(2)}, ("x", "t", "y", "budget")),
        "plain forward": (place.plain, dict(place.inputs), ("x", "t", "y", "budget")),
        "elastic forward": (place.elastic, dict(place.inputs), ("x", "t", "y", "budget")),
        "CFG": (elit.CFG, {"scale": 1.5}, ("scale", "interval")),
        "AG": (elit.AG, {"scale": 1.5, "budget": 1}, ("scale", "budget", "interval")),
        "CCFG": (elit.CCFG, {"scale": 1.5, "budget": 1}, ("scale", "budget", "interval")),
        "InterfaceSpec": (elit.InterfaceSpec, dict(sizes["interface"]), ("split", "window", "num_latents")),
        "Plan": (
            lambda **given: elit.sample(place.model, [0], plan=elit.Plan(**given)),
            {"steps": 1},
            ("steps", "budget", "guidance", "cache", "batch", "ms", "gflops", "words", "metric", "quality"),
        ),
        "Text": (
            lambda **given: place.text.prepare_condition(elit.Text(**given)),
            {"embeddings": torch.zeros(2, 4, 8), "mask": torch.ones(2, 4, dtype=torch.bool)},
            ("embeddings", "mask", "pooled"),
        ),
        "TextEncoder": (elit.TextEncoder, {"name": place["empty"], "length": 4}, ("name", "length", "device", "dtype")),
        "create_model": (
            elit.create_model,
            {"name": "ELIT-DiT-S/1", **SIZES, "split": (1, 1, 1), "window": (4, 4)},
            ("name", *SIZES, "split", "window", "num_latents", "patch_size", "mlp_ratio", "class_names", "unknown"),
        ),
        "list_models": (elit.list_models, {}, ("unknown",)),
        "count_flops": (elit.count_flops, {"model_or_name": place.model}, ("model_or_name", "sample_size", "budget")),
        "elastify": (
            lambda **given: elit.elastify(**{"model": tiny("DiT-S/1")} | given),
            elastic,
            ("model", *elastic, "mode", "seed"),
        ),
        "Family": (elit.Family, _family(), tuple(_family())),
        "register_family": (
            elit.register_family,
            {"kind": Other, "family": elit.Family(**_family())},
            ("kind", "family"),
        ),
        "check_family": (
            elit.check_family,
            {"transformer": place.plain, "call": dict(place.inputs), **elastic},
            ("transformer", "call", *elastic),
        ),
        "budget": (enter, {"value": 1}, ("value", "guidance", "doubled", "reference")),
        "plan": (
            elit.plan,
            {"model": place.model, "target_gflops": 1.0},
            (
                *("model", "target_gflops", "target_ms", "target_images_per_s", "batch", "guidance", "cache", "dtype"),
                *("quality", "table", "profile", "compile"),
            ),
        ),
        "load_model": (elit.load_model, {"folder": place["model"]}, ("folder", "torch_dtype")),
        "load_elastic": (elit.load_elastic, {"pipe_or_folder": place["elastic"]}, ("pipe_or_folder", "name")),
        "load_released": (
            elit.load_released,
            {"path": place["released.pt"], "num_heads": 2, "tail_blocks": 1},
            ("path", "kind", "num_heads", "tail_blocks", "ema"),
        ),
        "ElitPipeline": (
            elit.ElitPipeline,
            {"transformer": place.model, "scheduler": FlowMatchEulerDiscreteScheduler()},
            ("transformer", "scheduler", "vae", "text_encoder", "tokenizer"),
        ),
        "pipeline": (pipe, {"class_labels": [1], "num_inference_steps": 1}, CALL),
        "open_detector": (open_detector, {"specification": "digits"}, ("specification", "device")),
        "open_reference": (
            open_reference,
            {
                "path": Path(place["statistics.safetensors"]),
                "detector": place.detector,
                "out": place.work / "s",
                "chunk": 4,
            },
            ("image_size", "chunk", "batch_size"),
        ),
        "Sampling": (
            lambda **given: Sampler(place.model, place.work / "s").planned(elit.Sampling(**given), 2),
            {"steps": 1},
            ("steps", "budget", "guidance", "solver", "shift", "cache", "seed"),
        ),
        "score": (
            score,
            {
                "pictures": place.pictures,
                "detector": place.detector,
                "reference": None,
                "out": place.work / "s",
                "metrics": ("is",),
            },
            ("metrics", "chunk", "batch_size"),
        ),
        "load_examples": (
            load_examples,
            {"model": place.model, "data": "samples", "count": 2},
            ("model", "data", "count", "vae", "image_size", "seed"),
        ),
        "Probe": (
            lambda **given: losses(place.model, Probe(**given), 1),
            {"x": place.inputs["x"], "y": place.inputs["y"], "times": (0.5,), "draws": 1},
            ("x", "y", "times", "draws", "seed", "batch_size"),
        ),
    }


def _family() -> dict[str, Any]:
    from elit.elastic.families import FAMILIES

    return dict(vars(FAMILIES["DiT"]))


def check_right(place: Place, known: dict[str, Call]) -> None:
    """Calls each function with the arguments that are right: one that is always refused would test nothing."""
    for name, (function, right, _) in known.items():
        if name != "TextEncoder":  # of transformers' encoders there is none here
            function(**right)
    place.restore()


def call(place: Place, known: dict[str, Call], draw: Any) -> None:
    """One draw of a function. Raises AssertionError where its outcome is none of those that it may have."""
    name = draw(st.sampled_from(sorted(known)))
    function, right, names = known[name]
    drawn = draw(st.lists(st.sampled_from(names), min_size=0 if name == "list_models" else 1, max_size=3, unique=True))
    folders = st.sampled_from([place[each] for each in ("model", "plain", "elastic", "pipe", "cut", "empty", "itself")])
    given = {each: draw(ANYTHING if each in WORK else st.one_of(ANYTHING, BIG, folders)) for each in drawn}
    reply = ""
    try:
        function(**right | given)
    except (ValueError, TypeError) as error:
        reply = str(error)
    except Exception as error:
        raise AssertionError(f"{name} with {given}: {type(error).__name__}: {error}") from error
    finally:
        budget_block.set(None)
        refused = bool(reply) and place.changed()
        place.restore()
    assert "\n" not in reply, f"{name} with {given}: more than a line: {reply}"
    assert not refused, f"{name} with {given}: left {refused}"
