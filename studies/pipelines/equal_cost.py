"""Ways to a lower cost on one small Flux, alone and together: fewer steps, step caches, and the dial.

The pipeline has 16×16 tokens in 16 windows and eight blocks, of which the dial shortens six. It is trained here by
`examples/tiny_flux/train.py`, and its dial by `elit distill`; both are kept in --cache. Then each way makes the same
samples, from the same seeds. Accuracy: the share that shows the prompt's digit, by the classifier of `elit evaluate
--detector digits`. Distance: root mean square to the samples of all steps and tokens, pixels in [-1, 1]. GFLOPs: of a
sample, as torch counts them in the transformer. Seconds are processor time, of all samples, on one thread.

    python studies/pipelines/equal_cost.py                     # half an hour of one core, most of it training
    python studies/pipelines/equal_cost.py --print             # the table of the stored results
"""

import argparse
import contextlib
import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import elit
from elit.config import DistillConfig
from elit.data.builtin import DIGITS
from elit.elastic.distill import distill
from elit.evaluate.detectors import open_detector
from elit.evaluate.tables import markdown_table
from elit.files import write_text

ROOT = Path(__file__).parents[2]
SIZE, STEPS = 32, 16
Setting = dict[str, Any]  # steps, budget, cache, dial: what is set beside the defaults


def settings(ratios: list[float]) -> Iterator[tuple[str, Setting]]:
    """Settings by name; ratios: MagCache's, as diffusers calibrates them."""
    caches: dict[str, Callable[[], Any]] = {
        f"FirstBlockCache {threshold}": lambda threshold=threshold: diffusers.FirstBlockCacheConfig(threshold=threshold)
        for threshold in (0.1, 0.2, 0.4)
    }
    caches |= {
        f"TaylorSeer every {interval}": lambda interval=interval: diffusers.TaylorSeerCacheConfig(
            cache_interval=interval, disable_cache_before_step=2, max_order=1, taylor_factors_dtype=torch.float32
        )
        for interval in (2, 4)
    }
    caches |= {
        f"MagCache {threshold}": lambda threshold=threshold: diffusers.MagCacheConfig(
            threshold=threshold, num_inference_steps=STEPS, mag_ratios=ratios
        )
        for threshold in (0.06, 0.24)
    }
    yield "all", {}
    for steps in (12, 8, 6, 4, 3, 2):
        yield f"{steps} steps", {"steps": steps}
    for name, cache in caches.items():
        yield name, {"cache": cache}
    for budget in (0.75, 0.5, 0.25):
        yield f"untrained dial {budget:.0%}", {"budget": budget, "dial": (1, 7)}
    yield "untrained dial 50% in the last half", {"budget": "100%@0-0.5,50%@0.5-1", "dial": (1, 7)}
    yield "untrained dial 50%, blocks 3 to 6", {"budget": 0.5, "dial": (2, 6)}
    for budget in (0.5, 0.25, 0.125, 1):
        yield f"dial {share(budget)}", {"budget": budget, "dial": "trained"}
    for budget, steps in ((0.5, 8), (0.25, 8), (0.25, 6), (0.25, 4), (0.125, 8)):
        yield f"dial {share(budget)}, {steps} steps", {"budget": budget, "dial": "trained", "steps": steps}
    for budget in (0.5, 0.25):
        for name, cache in caches.items():
            if name.endswith((" 0.2", " 2", " 0.06")):
                yield f"dial {share(budget)}, {name}", {"budget": budget, "dial": "trained", "cache": cache}


def share(budget: float) -> str:
    return "6.25%" if budget == 1 else f"{100 * budget:g}%"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--steps", type=int, default=600, help="of the distillation")
    parser.add_argument("--cache", type=Path, default=ROOT / "runs" / "equal-cost")
    parser.add_argument("--out", type=Path, default=ROOT / "studies" / "results" / "equal_cost.json")
    parser.add_argument("--print", action="store_true", help="print the table of --out and leave")
    arguments = parser.parse_args()
    if not arguments.print:
        torch.set_num_threads(1)
        write_text(arguments.out, json.dumps(study(arguments), indent=1) + "\n")
    print(table(json.loads(arguments.out.read_text(encoding="utf-8"))))


def study(arguments: argparse.Namespace) -> dict[str, Any]:
    base, dial, times = arguments.cache / "pipeline", arguments.cache / "dial", arguments.cache / "seconds.json"
    seconds = json.loads(times.read_text(encoding="utf-8")) if times.is_file() else {}
    if not base.is_dir():
        start = time.perf_counter()
        script = str(ROOT / "examples" / "tiny_flux" / "train.py")
        subprocess.run([sys.executable, script, str(base), "--size", str(SIZE)], check=True)
        seconds["pipeline, wall"] = round(time.perf_counter() - start)
        write_text(times, json.dumps(seconds))
    if not (dial / "elastic.json").is_file():
        start = time.process_time()
        distill(
            DistillConfig(
                pipeline=str(base),
                out=str(dial),
                prompts=str(base / "prompts.txt"),
                sizes=(f"{SIZE}x{SIZE}",),
                call=("max_sequence_length=8",),
                window=(4, 4),
                read_after=1,
                write_after=7,
                lora_rank=8,
                trajectories=160,
                teacher_batch=40,
                teacher_steps=STEPS,
                steps=arguments.steps,
                learning_rate=3e-3,
                ema_decay=0.995,
                preview_every=0,
                resume=dial.is_dir(),
            )
        )
        seconds["dial, processor"] = round(time.process_time() - start)
        write_text(times, json.dumps(seconds))
    detector, rows = open_detector("digits"), []
    first: Tensor | None = None
    for name, setting in settings(calibrated(base)):
        pipe = pipeline(base, dial, setting)
        start = time.process_time()
        images, labels = draw(pipe, setting, arguments.samples)
        spent = time.process_time() - start
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            draw(pipe, setting, 10)
        transformer = sum(counter.get_flop_counts()["FluxTransformer2DModel"].values())
        first = images if first is None else first
        logits = detector(F.avg_pool2d(images.mean(1, keepdim=True), SIZE // 8)).logits
        assert logits is not None
        row = {
            "way": name,
            "accuracy": round((logits.argmax(1) == labels).double().mean().item(), 4),
            "distance": round((images - first).square().mean().sqrt().item(), 4),
            "gflops": round(transformer / 10 / 1e9, 3),
            "seconds": round(spent, 2),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    return {"samples": arguments.samples, "distillation_steps": arguments.steps, "training": seconds, "rows": rows}


def pipeline(base: Path, dial: Path, setting: Setting) -> diffusers.FluxPipeline:
    """A new one for each row, so that no cache is left from the last."""
    pipe = diffusers.FluxPipeline.from_pretrained(base)
    pipe.set_progress_bar_config(disable=True)
    if setting.get("dial") == "trained":
        elit.load_elastic(pipe, dial)
    elif "dial" in setting:
        read, write = setting["dial"]
        elit.elastify(pipe.transformer, read_after=read, write_after=write, window=(4, 4))
    if "cache" in setting:
        pipe.transformer.enable_cache(setting["cache"]())
    return pipe


def draw(pipe: diffusers.FluxPipeline, setting: Setting, count: int) -> tuple[Tensor, Tensor]:
    """images (count, 3, SIZE, SIZE) in [-1, 1] of all digits in turn, always of the same seeds."""
    labels, images = torch.arange(count) % len(DIGITS), []
    for number, part in enumerate(labels.split(50)):
        with elit.budget(setting["budget"]) if "budget" in setting else contextlib.nullcontext():
            drawn = pipe(
                [f"a photo of a {DIGITS[label]}" for label in part], height=SIZE, width=SIZE, max_sequence_length=8,
                num_inference_steps=setting.get("steps", STEPS), output_type="pt",
                generator=torch.Generator().manual_seed(number),
            ).images  # fmt: skip
        images.append(drawn * 2 - 1)
        if hasattr(pipe.transformer, "_reset_stateful_cache"):
            pipe.transformer._reset_stateful_cache()
    return torch.cat(images).float(), labels


def calibrated(base: Path) -> list[float]:
    """MagCache's ratios of the original, which diffusers prints."""
    cache = diffusers.MagCacheConfig(calibrate=True, num_inference_steps=STEPS)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        draw(pipeline(base, base, {"cache": lambda: cache}), {}, 50)
    found = re.search(r"\[([\d., e-]+)\]\s*$", output.getvalue())
    assert found, output.getvalue()
    return [float(number) for number in found[1].split(",")]


def table(results: dict[str, Any]) -> str:
    rows, whole = [], results["rows"][0]
    for row in sorted(results["rows"], key=lambda row: -row["gflops"]):
        times = f"{whole['seconds'] / row['seconds']:.2f}×"
        cells = (
            f"{row['gflops']:.2f}",
            f"{row['seconds']:.1f}",
            times,
            f"{row['accuracy']:.3f}",
            f"{row['distance']:.3f}",
        )
        rows.append([row["way"], *cells])
    return markdown_table(["way", "GFLOPs", "s", "faster", "accuracy", "distance"], rows)


if __name__ == "__main__":
    main()
