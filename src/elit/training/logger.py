"""The log of a training run: a progress bar, metrics.jsonl with one line a step, and trackers."""

import json
import math
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from elit.config import RunConfig
from elit.data.loader import StepSampler
from elit.files import Json, write_text
from elit.models.saved import checkpoints
from elit.sampling.pictures import save_frames

BUCKETS = 10  # of t, equally wide
METRICS, SKIPPED, SCORES = "metrics.jsonl", "skipped.jsonl", "scores.jsonl"


class RunLog:
    """Collects every step's figures on the device and reads them back once in `log_every` steps."""

    def __init__(self, config: RunConfig, accelerator: Accelerator, flops: dict[int | None, int], sampler: StepSampler):
        self.config, self.accelerator, self.sampler = config, accelerator, sampler
        self.start, self.out = sampler.start, Path(config.out)
        self.cost = {budget: config.batch_size * count for budget, count in flops.items()}
        self.pending: list[Json] = []
        self.by_time = torch.zeros(2, BUCKETS, device=accelerator.device)  # sums of losses, and how many
        self.skipped = 0
        self.since, self.waited = time.perf_counter(), 0.0
        self.console = Console(stderr=True, quiet=not accelerator.is_main_process)
        columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        options = {"console": self.console, "disable": not self.console.is_terminal, "speed_estimate_period": 300}
        self.bar = Progress(*columns, TextColumn("{task.fields[figures]}"), **options)
        self.task = self.bar.add_task("training", total=config.steps, completed=self.start, figures="")
        name, logs, options = self.out.resolve().name, self.out / "logs", dict[str, Json]()
        if accelerator.is_main_process:
            if not (self.start and (logs / "run-id").is_file()):
                write_text(logs / "run-id", uuid.uuid4().hex)
            run = (logs / "run-id").read_text(encoding="utf-8")  # one in a tracker however often it is resumed
            options["wandb"] = {"name": name, "id": run, "resume": "allow", "dir": str(logs)}
            for file in (METRICS, SKIPPED, SCORES):
                _forget_later_steps(self.out / file, self.start)
        options["tensorboard"] = {"purge_step": self.start or None}
        options["trackio"] = {"name": name, "resume": "allow" if self.start else "never"}
        accelerator.init_trackers("elit", init_kwargs=options)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time that is no part of a step: checkpoints, previews."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def add_losses(self, t: Tensor, losses: Tensor) -> None:
        """t and losses (B,) of a micro-batch, for the mean loss of each bucket of t; stays on the device."""
        bucket = (t * BUCKETS).long().clamp(max=BUCKETS - 1)
        finite = losses.isfinite()
        values = torch.stack((losses.detach().where(finite, 0.0), finite.float()))
        self.by_time.index_add_(1, bucket, values)

    def add(self, step: int, *, loss: Tensor, gradient_norm: Tensor, budget: int | None, lr: float) -> None:
        """Figures of one step; tensors stay on the device until `flush`."""
        self.pending.append({"step": step, "loss": loss, "gradient_norm": gradient_norm, "budget": budget, "lr": lr})
        self.bar.update(self.task, completed=step)

    def flush(self, waited: float) -> None:
        """Writes what was collected; `waited`: seconds without data. Raises FloatingPointError, see `max_skipped`."""
        rows, self.pending = self.pending, []
        seconds, device = time.perf_counter() - self.since, self.accelerator.device
        own = [*(row["loss"] for row in rows), torch.tensor(waited - self.waited, device=device)]
        *losses, wait = self.accelerator.reduce(torch.stack(own), reduction="mean").tolist()
        norms = torch.stack([row["gradient_norm"] for row in rows]).tolist()
        sums, counts = self.accelerator.reduce(self.by_time, reduction="sum").tolist()
        flops = sum(self.cost[row["budget"]] for row in rows) / self.accelerator.num_processes
        used = psutil.Process().memory_info().rss  # on a CPU, of this process now
        if device.type != "cpu":
            used = torch.get_device_module(device).max_memory_allocated(device)
        figures: Json = {
            "images_per_s": round(len(rows) * self.config.batch_size / seconds, 1),
            "data_wait": round(wait / seconds, 4),
            "tflops_per_s": round(flops / seconds / 1e12, 4),
            "memory_gib": round(used / 2**30, 3),
        }
        by_budget: dict[str, list[float]] = defaultdict(list)
        for row, loss, norm in zip(rows, losses, norms, strict=True):
            row |= {"loss": loss, "gradient_norm": norm} | figures
            if row["budget"] is not None and math.isfinite(loss):
                by_budget[str(row["budget"])].append(loss)
        bad = [row for row in rows if not math.isfinite(row["gradient_norm"])]
        self.skipped += len(bad)
        rows[-1] |= {
            "loss_by_t": [round(s / n, 6) if n else None for s, n in zip(sums, counts, strict=True)],
            "loss_by_budget": {key: round(sum(by_budget[key]) / len(by_budget[key]), 6) for key in by_budget},
            "skipped": self.skipped,
        }
        self.since, self.waited = time.perf_counter(), waited
        self.by_time.zero_()
        if self.accelerator.is_main_process:
            _append(self.out / METRICS, rows)
            named = [{key: row[key] for key in ("step", "loss", "gradient_norm", "budget")} for row in bad]
            _append(self.out / SKIPPED, [row | {"samples": self.sampler.samples(row["step"] - 1)} for row in named])
        for row in rows:
            self.accelerator.log(_scalars(row), step=row["step"])
        self._show(rows)
        step = rows[-1]["step"]
        if self.skipped > self.config.max_skipped or (step == self.config.steps and self.skipped == step - self.start):
            last = next(reversed(checkpoints(self.out / "checkpoints")), "none")
            raise FloatingPointError(
                f"loss or gradient not finite in {self.skipped} steps, the last of them {bad[-1]['step']} (max_skipped="
                f"{self.config.max_skipped}); the samples of each are in {str(self.out / SKIPPED)!r}; mend the data or "
                f"lower learning_rate; last good checkpoint: {last}"
            )

    def scores(self, rows: Sequence[Json], step: int) -> None:
        """Writes scores of the averaged weights at several budgets, in the main process."""
        _append(self.out / SCORES, [{"step": step} | row for row in rows])
        for row in rows:
            named = {f"{name}/{row['budget'] or 'all'}": value for name, value in row.items() if name != "budget"}
            self.accelerator.log(named, step=step)
            self.say(f"step {step:,} · " + " · ".join(f"{name} {value:.4g}" for name, value in named.items()))

    def say(self, line: str) -> None:
        """Prints a line on stderr, from the main process only."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def image(self, image: Image.Image, step: int) -> None:
        """Writes a preview into samples/, TensorBoard and wandb, from the main process only."""
        if self.accelerator.is_main_process:
            save_frames([image], self.out / "samples" / f"step-{step:08d}.png")
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({"samples": np.asarray(image)[None]}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({"samples": [image]}, step=step)

    def _show(self, rows: Sequence[Json]) -> None:
        last = rows[-1]
        finite = [row["loss"] for row in rows if math.isfinite(row["loss"])]
        mean = f"{sum(finite) / len(finite):.4f}" if finite else "not finite"
        budget = "" if last["budget"] is None else f" · {last['budget']} latent{'s' * (last['budget'] > 1)}"
        skipped = f" · {self.skipped} skipped" if self.skipped else ""
        text = f"loss {mean} · {last['images_per_s']:,.0f} images/s{budget}{skipped}"
        self.bar.update(self.task, figures=text)
        if self.bar.disable:
            times = self.bar.tasks[0].elapsed, self.bar.tasks[0].time_remaining  # None before two steps are done
            passed, to_go = ("?" if each is None else timedelta(seconds=round(each)) for each in times)
            self.say(f"step {last['step']:,}/{self.config.steps:,} · {text} · {passed} passed, {to_go} to go")


def _forget_later_steps(path: Path, start: int) -> None:
    """Drops what a run that was killed after its last checkpoint has written since, a torn line included."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if start and path.is_file() else []:
        with suppress(json.JSONDecodeError):
            kept += [line] if json.loads(line)["step"] <= start else []
    if kept or path.is_file() or path.name == METRICS:
        write_text(path, "".join(f"{line}\n" for line in kept))


def _append(path: Path, rows: Sequence[Json]) -> None:
    finite = [{k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()} for row in rows]
    if finite:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in finite)


def _scalars(row: Json) -> Json:
    scalars = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}
    for i, loss in enumerate(row.get("loss_by_t", [])):
        if loss is not None:
            scalars[f"loss_by_t/{i / BUCKETS:.1f}-{(i + 1) / BUCKETS:.1f}"] = loss
    return scalars | {f"loss_by_budget/{budget}": loss for budget, loss in row.get("loss_by_budget", {}).items()}
