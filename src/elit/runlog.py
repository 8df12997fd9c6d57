"""What a training run tells: a progress bar, metrics.jsonl with one line a step, and TensorBoard."""

import json
import math
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from elit.checkpoint import checkpoints
from elit.config import TrainConfig, write_text


class RunLog:
    """Collects every step's figures on the device and reads them back once in `log_every` steps."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, *, start: int):
        self.config, self.accelerator, self.start = config, accelerator, start
        self.path = Path(config.out) / "metrics.jsonl"
        self.pending: list[dict[str, Any]] = []
        self.since = time.perf_counter()
        self.console = Console(stderr=True, quiet=not accelerator.is_main_process)
        columns = TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self.bar = Progress(*columns, TextColumn("{task.fields[figures]}"), console=self.console)
        self.task = self.bar.add_task("training", total=config.steps, completed=start, figures="")
        accelerator.init_trackers("logs", init_kwargs={"tensorboard": {"purge_step": start or None}})
        if accelerator.is_main_process:
            # A run that was killed after its last checkpoint repeats those steps; forget their first try.
            lines = self.path.read_text(encoding="utf-8").splitlines()[:start] if start else []
            write_text(self.path, "".join(f"{line}\n" for line in lines))

    def progress(self) -> AbstractContextManager[Any]:
        """Shows the bar while training; without a terminal each flush prints a line instead."""
        return self.bar if self.console.is_terminal else nullcontext()

    def add(self, step: int, *, loss: Tensor, gradient_norm: Tensor, budget: int | None, lr: float) -> None:
        """Figures of one step; tensors stay on the device until `flush`."""
        self.pending.append({"step": step, "loss": loss, "gradient_norm": gradient_norm, "budget": budget, "lr": lr})
        self.bar.update(self.task, completed=step)
        if step % self.config.log_every == 0:
            self.flush()

    def flush(self) -> None:
        """Writes what was collected. Raises FloatingPointError where a loss is not finite."""
        if not self.pending:
            return
        losses = self.accelerator.reduce(torch.stack([row["loss"] for row in self.pending]), reduction="mean").tolist()
        norms = torch.stack([row["gradient_norm"] for row in self.pending]).tolist()
        now = time.perf_counter()
        speed = len(self.pending) * self.config.batch_size / (now - self.since)
        rows = [
            row | {"loss": loss, "gradient_norm": norm, "images_per_s": round(speed, 1)}
            for row, loss, norm in zip(self.pending, losses, norms, strict=True)
        ]
        self.pending, self.since = [], now
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        for row in rows:
            self.accelerator.log({key: value for key, value in row.items() if value is not None}, step=row["step"])
        last = rows[-1]
        budget = "" if last["budget"] is None else f" · {last['budget']} latents"
        figures = f"loss {sum(losses) / len(losses):.4f} · {speed:,.0f} images/s{budget}"
        self.bar.update(self.task, figures=figures)
        if not self.console.is_terminal:
            self.say(f"step {last['step']:,}/{self.config.steps:,} · {figures}")
        if wrong := [row["step"] for row in rows if not math.isfinite(row["loss"])]:
            saved = checkpoints(Path(self.config.out) / "checkpoints")
            raise FloatingPointError(
                f"loss is not finite at step {wrong[0]}; lower learning_rate or check the data; last good checkpoint: "
                f"{saved[-1] if saved else 'none'}"
            )

    def say(self, line: str) -> None:
        """Prints a line on stderr, from the main process only."""
        self.console.print(line, highlight=False, soft_wrap=True)

    def image(self, image: Image.Image, step: int) -> None:
        """Puts a preview into TensorBoard; main process only."""
        writer = self.accelerator.get_tracker("tensorboard", unwrap=True)
        writer.add_image("samples", np.asarray(image), step, dataformats="HWC")
