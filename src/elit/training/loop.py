"""Training: one straight loop on accelerate, whatever is trained (paper section 3)."""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from elit.budgets import draw_budget
from elit.compat import whole_graphs_under_ddp
from elit.config import RunConfig, load_config, save_config
from elit.data.loader import Feed
from elit.models.layers import weight_groups
from elit.models.saved import MANIFEST, checkpoint_step, checkpoints, damage
from elit.training.checkpoint import AveragedWeights, CheckpointWriter, RunState, claimed_folder, load_state
from elit.training.distributed import (
    Termination,
    broadcast_from_main,
    clip_gradients,
    make_accelerator,
    prepare,
    trained_weights,
)
from elit.training.logger import RunLog
from elit.training.task import Task


def train_task(config: RunConfig, make_task: Callable[[Accelerator], Task]) -> Any:
    """Trains what `make_task` makes, in the folder `config.out`; returns what its `finish` does."""
    accelerator, precision = make_accelerator(config), torch.get_float32_matmul_precision()
    if accelerator.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32: products of 10 bits, sums of 23, several times as fast
    try:
        task = make_task(accelerator)  # what can be refused before anything is written
        trained = sum(weight.numel() for weight in trained_weights(task.network))
        with claimed_folder(task.config, accelerator, trained):
            result = run(accelerator, task)
    except (ValueError, SystemExit):
        # Refusals and SIGTERM reach all processes. One that leaves its group to the interpreter's end may abort
        # there, exit code lost. Any other failure is one process's own: ending the group would wait for the rest.
        accelerator.end_training()
        raise
    finally:
        torch.set_float32_matmul_precision(precision)
    accelerator.end_training()
    return result


def run(accelerator: Accelerator, task: Task) -> Any:
    """The loop, in a folder that is this run's alone."""
    config, network, device = task.config, task.network, accelerator.device
    resumed, notes = find_checkpoint(config, accelerator, task.identity)
    notes += task.initialize(resumed=resumed is not None)
    sampler, parts = task.sampler, config.gradient_accumulation
    model = prepare(accelerator, network, task.blocks, config)
    optimizers = make_optimizers(config, network, task.blocks)
    names = {"model": config.ema_decay, **{f"model-ema-{decay}": decay for decay in config.ema_more}}
    averages = [AveragedWeights(network, names[name], name=name, on_cpu=config.ema_on_cpu) for name in names]
    state = RunState(network, optimizers, averages)
    if resumed:
        load_state(resumed, state)
        sampler.start = checkpoint_step(resumed)
        notes.insert(0, f"resumed from step {sampler.start:,}")
    if accelerator.is_main_process:
        save_config(replace(config, resume=False), Path(config.out) / "config.yaml")
    log = RunLog(config, accelerator, task.flops, sampler)
    for line in notes:
        log.say(line)

    feed = Feed(task.examples, sampler, config.workers, device, log.say)
    objective = task.objective(accelerator)
    model.train()
    writer = CheckpointWriter(accelerator, state, config, task.identity)
    with log.bar, Termination(accelerator) as termination, writer, whole_graphs_under_ddp():
        for step in range(sampler.start, config.steps):
            budget, lr = draw_budget(config.seed, step, task.budgets), config.learning_rate_at(step)
            draws = objective.draw(step)
            loss = torch.zeros((), device=device)
            for part in range(parts):
                batch, rows = next(feed), sampler.rows(part)
                last = part == parts - 1
                if isinstance(model, FSDPModule):
                    model.set_requires_gradient_sync(last)
                with nullcontext() if last else accelerator.no_sync(model):
                    t, losses = objective.losses(model, batch, [draw[rows] for draw in draws], budget)
                    part_loss = losses.mean() / parts
                    accelerator.backward(part_loss)
                loss += part_loss.detach()
                log.add_losses(t, losses)
            gradient_norm = clip_gradients(network, config.max_grad_norm)
            optimizer_step(optimizers, lr, gradient_norm)
            for average in averages:
                average.step(network)

            done, end, stop = step + 1, step + 1 == config.steps, termination.should_stop()
            save = done % config.checkpoint_every == 0 or end or stop
            log.add(done, loss=loss, gradient_norm=gradient_norm, budget=budget, lr=lr)
            if save or done % config.log_every == 0:
                log.flush(feed.waited)
            with log.pause():
                due = config.preview_every and (done % config.preview_every == 0 or end)
                if due and (accelerator.is_main_process or config.fsdp):  # a sharded network needs all processes
                    task.preview(accelerator, averages[0], log, done)
                task.score(averages[0], log, done)
                if save:
                    writer.save(done)
            if stop and not end:
                writer.wait()
                by = termination.signal or "SIGTERM"
                log.say(f"stopped by {by} after step {done:,}, checkpoint saved; set resume to go on")
                raise SystemExit(0)

    return task.finish(accelerator, averages)


def make_optimizers(config: RunConfig, network: nn.Module, blocks: Iterable[nn.Module]) -> list[torch.optim.Optimizer]:
    """One for all weights, or AdamW and Muon, whose updates are as large as AdamW's: they share the learning rate."""
    groups, lr, decay = weight_groups(network, blocks, config.optimizer), config.learning_rate, config.weight_decay
    matrices = groups.pop("muon", [])
    parts = [{"params": each, "weight_decay": decay * (kind == "adamw")} for kind, each in groups.items()]
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    optimizers: list[torch.optim.Optimizer] = [kind(parts, lr=lr, betas=config.betas, fused=True)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def optimizer_step(optimizers: Sequence[torch.optim.Optimizer], lr: float, gradient_norm: Tensor) -> None:
    """Moves the weights, unless the norm of their gradient is not finite; the gradients are gone afterwards."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        # Fused Adam leaves out a step whose gradient is not finite by itself; for Muon the CPU must wait and see.
        optimizer.found_inf = (~gradient_norm.isfinite()).float()  # pyrefly: ignore[missing-attribute]
        if not isinstance(optimizer, torch.optim.Muon) or gradient_norm.isfinite():
            optimizer.step()
        optimizer.zero_grad()


def find_checkpoint(
    config: RunConfig, accelerator: Accelerator, identity: dict[str, object]
) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint and lines about it; the processes share the reading. Raises ValueError."""
    paths, notes = broadcast_from_main(accelerator, lambda: inspect_run_dir(config))
    rank, now = accelerator.process_index, accelerator.num_processes
    for path in reversed(paths):
        if fault := next(filter(None, gather_object([damage(path, rank, now)])), None):
            notes.insert(0, f"ignored: {fault}")
            continue
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if (was := manifest["processes"]) != now:
            notes.append(f"changed: processes {was} → {now}; sums run in another order: losses agree to rounding")
        before = manifest.get("data") or identity
        if before.get("classes") != identity.get("classes"):
            raise ValueError("resume: the classes of the data cannot change within a run; give another folder")
        if before != identity:
            notes.append(f"changed: the data, {before['count']:,} → {identity['count']:,} samples, in another order")
        return path, notes
    if paths:
        raise ValueError(notes[0].removeprefix("ignored: "))
    return None, notes


def inspect_run_dir(config: RunConfig) -> tuple[list[Path], list[str]]:
    """Checkpoints in the run's folder, and what has changed since; half-written ones are removed. Raises ValueError."""
    out, notes = Path(config.out), []
    for half in (out / "checkpoints").glob(".step-*.tmp"):
        notes.append(f"ignored and removed: {str(half)!r}, a checkpoint that was only half written")
        shutil.rmtree(half)
    paths = checkpoints(out / "checkpoints")
    if not paths:
        return [], notes
    step = checkpoint_step(paths[-1])
    if not config.resume:
        raise ValueError(f"out={config.out!r}: holds a run at step {step}; set resume to go on, or give another folder")
    if step > config.steps:
        raise ValueError(f"steps={config.steps}: the run in {config.out!r} is at step {step}")
    before, now = _flat(load_config(out / "config.yaml", type(config))), _flat(config)
    changed = [name for name, value in now.items() if value != before[name]]
    lines = ", ".join(f"{name} {before[name]!r} → {now[name]!r}" for name in changed)
    if any(name.partition(".")[0] in config.FIXED_ON_RESUME for name in changed):
        raise ValueError(f"resume: {lines} cannot change within a run; give another folder")
    return paths, notes + [f"changed: {lines}"] * bool(lines)


def _flat(config: RunConfig) -> dict[str, object]:
    plain = {name: value for name, value in asdict(config).items() if name not in ("resume", "out", "init")}
    model = {f"model.{name}": value for name, value in plain.pop("model", {}).items()}
    if (data := plain.get("data")) and Path(data).exists():
        plain["data"] = str(Path(data).resolve())
    return plain | model
