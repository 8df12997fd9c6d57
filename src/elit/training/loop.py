"""Training: one straight loop on accelerate (paper section 3)."""

import random
import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from elit.budgets import draw_budget, resolve_budget, training_budgets
from elit.compat import whole_graphs_under_ddp
from elit.config import TrainConfig, load_config, save_config
from elit.data.builtin import named_images
from elit.data.images import ImageData, ImageFolder, as_pictures, image_grid, save_image
from elit.data.latents import LatentSet, posterior_sample
from elit.data.loader import Feed
from elit.data.sampler import StepSampler, batch_slice
from elit.data.text import CACHE, PromptedImages, encode_prompts
from elit.flow.path import flow_matching_loss, interpolate, logit_normal
from elit.models.conditioning import Condition, Text
from elit.models.mmdit import MMDiT
from elit.models.presets import create_model, model_config
from elit.models.saved import checkpoint_step, checkpoints, load_shared_weights, save_model
from elit.models.transformer import Transformer
from elit.sampling.sample import sample
from elit.training.checkpoint import claimed_folder, fault_of, load_state, save_state, saved_by
from elit.training.distributed import Termination, agreed, clip_gradients, make_accelerator, plain_network, prepare
from elit.training.ema import AveragedWeights
from elit.training.logger import RunLog, check_trackers

# What makes a run the run it is; the rest may change when it goes on.
FIXED_ON_RESUME = ("model", "data", "image_size", "skip_unreadable", "batch_size", "seed")


def train(config: TrainConfig) -> Transformer:
    """Trains and saves `config.out`/model (averaged weights); returns that network, on the CPU.

    With `resume` it goes on from the newest complete checkpoint, to numbers equal to an uninterrupted run's. On SIGTERM
    it saves one after the step it is at and leaves with SystemExit(0).
    Raises ValueError where the settings do not fit each other, the data or the folder, FloatingPointError where too
    many steps have no finite gradient, OSError where a checkpoint cannot be written.
    """
    check_trackers(config)
    accelerator = make_accelerator(config)
    try:
        network = prepared_run(config, accelerator)
    except (ValueError, SystemExit):
        # Refusals and SIGTERM reach all processes. One that leaves its group to the interpreter's end may abort
        # there, exit code lost. Any other failure is one process's own: ending the group would wait for the rest.
        accelerator.end_training()
        raise
    accelerator.end_training()
    return network


def prepared_run(config: TrainConfig, accelerator: Accelerator) -> Transformer:
    """What can be refused before anything is written, then the run."""
    data = load_data(config)
    with accelerator.main_process_first():
        prompts = load_prompts(config, data, accelerator.device)
    config = resolve(config, data, prompts)
    sampler = StepSampler(
        len(data),
        seed=config.seed,
        batch_size=config.batch_size,
        parts=config.gradient_accumulation,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        stop=config.steps,
    )
    set_seed(config.seed)
    names: dict[str, Any] = {"class_names": tuple(data.classes)} if prompts is None else {}
    network = create_model(**config.model.chosen(), **names)
    budgets = training_budgets(network.budgets, config.budget_min, config.budget_max)
    with claimed_folder(config, accelerator, network.num_parameters()):
        return run(config, accelerator, network, budgets, data, prompts, sampler)


def run(
    config: TrainConfig,
    accelerator: Accelerator,
    network: Transformer,
    budgets: Sequence[int],
    data: ImageData,
    prompts: Condition | None,
    sampler: StepSampler,
) -> Transformer:
    """The loop, in a folder that is this run's alone."""
    device, rank, world, parts = accelerator.device, accelerator.process_index, accelerator.num_processes, sampler.parts
    resumed, said = find_checkpoint(config, accelerator)
    if config.init and not resumed:
        new, left_out = load_shared_weights(network, config.init)
        names = f"init: {len(new)} weights start anew ({_names(new)}); {len(left_out)} left out ({_names(left_out)})"
        said.append(names)
    if skipped := getattr(data, "skipped", None):
        said.append(f"left out {len(skipped)} unreadable images, {str(skipped[0])!r} for one")
    model = prepare(accelerator, network, config)
    optimizer = torch.optim.Adam(network.parameters(), lr=config.learning_rate, fused=True)
    average = AveragedWeights(network, config.ema_decay, on_cpu=config.ema_on_cpu)
    if resumed:
        load_state(resumed, network, optimizer, average)
        sampler.start = checkpoint_step(resumed)
    if accelerator.is_main_process:
        save_config(replace(config, resume=False), Path(config.out) / "config.yaml")
    log = RunLog(config, accelerator, network, sampler)
    for line in said:
        log.say(line)

    examples = data if prompts is None else PromptedImages(data, prompts)
    feed = Feed(examples, sampler, workers=config.workers, device=device, say=log.say)
    moments = isinstance(data, LatentSet)
    numbers = torch.arange(8) % len(data.classes)
    shown = numbers if prompts is None else prompts[numbers]
    model.train()
    with log.progress(), Termination(accelerator) as termination, whole_graphs_under_ddp():
        for step in range(sampler.start, config.steps):
            budget = draw_budget(config.seed, step, budgets)
            lr = config.learning_rate * min(1.0, (step + 1) / max(config.warmup_steps, 1))
            noise, t, dropped = draw_step(config, step, data.shape, device)
            posterior = draw_posterior(config, step, data.shape, device) if moments else None

            loss = torch.zeros((), device=device)
            for part in range(parts):
                images, y = next(feed)
                rows = batch_slice(config.batch_size, parts, world, part, rank)
                y = network.without_condition(y, dropped[rows])
                if posterior is not None:
                    images = posterior_sample(images, posterior[rows])
                x = interpolate(noise[rows], images, t[rows])
                with accelerator.no_sync(model) if part < parts - 1 else nullcontext():
                    with accelerator.autocast():
                        velocity = model(x, t[rows], y, budget)
                    losses = flow_matching_loss(velocity, noise[rows], images)
                    part_loss = losses.mean() / parts
                    accelerator.backward(part_loss)
                loss += part_loss.detach()
                log.add_losses(t[rows], losses)
            gradient_norm = clip_gradients(network, config.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = lr
            # Fused Adam leaves out a step whose gradient is not finite by itself; the CPU need not wait and see.
            optimizer.found_inf = (~gradient_norm.isfinite()).float()  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad()
            average.step(network)

            done, end, stop = step + 1, step + 1 == config.steps, termination.asked()
            save = done % config.checkpoint_every == 0 or end or stop
            log.add(done, loss=loss, gradient_norm=gradient_norm, budget=budget, lr=lr)
            if save or done % config.log_every == 0:
                log.flush(feed.waited)
            with log.pause():
                if config.preview_every and (done % config.preview_every == 0 or end):
                    draw_preview(config, accelerator, network, average, shown, log, done)
                if save:
                    save_state(accelerator, network, optimizer, average, config, done)
            if stop and not end:
                log.say(f"stopped by SIGTERM after step {done:,}, checkpoint saved; set resume to go on")
                raise SystemExit(0)

    averaged = plain_network(accelerator, network).cpu().eval()
    averaged.load_state_dict(average.whole())
    if accelerator.is_main_process:
        save_model(averaged, Path(config.out) / "model")
    return averaged


def load_data(config: TrainConfig) -> ImageData:
    """The data set a run trains on."""
    if (images := named_images(config.data)) is not None:
        return images
    if (Path(config.data) / "encode.json").is_file():
        return LatentSet(config.data)
    return ImageFolder(
        config.data, config.image_size, skip_unreadable=config.skip_unreadable, captions=_takes_text(config)
    )


def load_prompts(config: TrainConfig, data: ImageData, device: torch.device) -> Condition | None:
    """A row of `y` for each of the data's captions, kept beside a folder's images; None where classes are used."""
    if not _takes_text(config):
        return None
    model = config.model
    plain = model.name.removeprefix("ELIT-")
    _, settings = model_config(plain, text_encoder=model.text_encoder, text_length=model.text_length)
    encoder, root = settings["text_encoder"], getattr(data, "root", None)
    cache = root and root / CACHE
    return encode_prompts(data.captions, encoder, length=settings["text_length"], cache=cache, device=device)


def _takes_text(config: TrainConfig) -> bool:
    return issubclass(model_config(config.model.name)[0], MMDiT)


def resolve(config: TrainConfig, data: ImageData, prompts: Condition | None) -> TrainConfig:
    """Fills in what the data decides: channels, size, classes or text. Raises ValueError where they clash."""
    channels, *size = data.shape
    model = config.model
    found: dict[str, Any] = {"in_channels": channels, "sample_size": size[0] if len(size) == 2 else tuple(size)}
    if isinstance(prompts, Text):
        pooled = 0 if prompts.pooled is None else prompts.pooled.shape[1]
        found |= {"text_features": prompts.embeddings.shape[2], "pooled_features": pooled}
    for name, value in found.items():
        if getattr(model, name) not in (None, value):
            raise ValueError(f"model.{name}={getattr(model, name)}: the data has {value}; leave it out")
    if prompts is None:
        classes = len(data.classes)
        if model.num_classes is not None and model.num_classes < classes:
            raise ValueError(f"model.num_classes={model.num_classes}: the data has {classes} classes")
        found["num_classes"] = model.num_classes or classes
    return replace(config, model=replace(model, **found))


def draw_step(
    config: TrainConfig, step: int, shape: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Noise (B, *shape), times (B,) and dropped labels (B,) bool of a step's whole batch, on every process alike.

    A function of (seed, step): a step is the same however many processes share it and wherever a run resumed.
    """
    seed = random.Random(f"step/{config.seed}/{step}").getrandbits(63)
    generator = torch.Generator(device).manual_seed(seed)
    noise = torch.randn(config.batch_size, *shape, generator=generator, device=device)
    normal = torch.randn(config.batch_size, generator=generator, device=device)
    dropped = torch.rand(config.batch_size, generator=generator, device=device) < config.class_dropout
    return noise, logit_normal(normal, config.time_shift), dropped


def draw_posterior(config: TrainConfig, step: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Noise (B, *shape) with which a step's latents are drawn from their posteriors; as `draw_step`, for all alike."""
    seed = random.Random(f"posterior/{config.seed}/{step}").getrandbits(63)
    return torch.randn(config.batch_size, *shape, generator=torch.Generator(device).manual_seed(seed), device=device)


def find_checkpoint(config: TrainConfig, accelerator: Accelerator) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, to go on from, and what there is to say about that.

    Raises ValueError where the folder and `resume` do not agree, or none of its checkpoints is whole.
    """
    found, said = agreed(accelerator, lambda: look_back(config))
    for path in reversed(found):
        if not (fault := fault_of(path, accelerator)):
            was, now = saved_by(path), accelerator.num_processes
            if was != now:
                said.append(f"changed: processes {was} → {now}; sums run in another order: losses agree to rounding")
            return path, said
        said.insert(0, f"ignored: {fault}")
    if found:
        raise ValueError(said[0].removeprefix("ignored: "))
    return None, said


def look_back(config: TrainConfig) -> tuple[list[Path], list[str]]:
    """Checkpoints in the run's folder, and what has changed since; half-written ones are removed. Raises ValueError."""
    out = Path(config.out)
    found = checkpoints(out / "checkpoints")
    said = []
    for half in (out / "checkpoints").glob(".step-*.tmp"):
        said.append(f"ignored and removed: {str(half)!r}, a checkpoint that was only half written")
        shutil.rmtree(half)
    if not config.resume and found:
        raise ValueError(
            f"out={config.out!r}: holds a run at step {checkpoint_step(found[-1])}; set resume to go on, or give "
            "another folder"
        )
    if not found:
        return [], said
    before = load_config(out / "config.yaml")
    changed = {
        name: f"{getattr(before, name)!r} → {value!r}"
        for name, value in vars(config).items()
        if name not in ("resume", "out", "init") and value != getattr(before, name)
    }
    if fixed := [f"{name} ({changed[name]})" for name in FIXED_ON_RESUME if name in changed]:
        raise ValueError(f"resume: {', '.join(fixed)} cannot change within a run; give another folder")
    if checkpoint_step(found[-1]) > config.steps:
        raise ValueError(f"steps={config.steps}: the run in {config.out!r} is at step {checkpoint_step(found[-1])}")
    if changed:
        said.append("changed: " + ", ".join(f"{name} {change}" for name, change in changed.items()))
    return found, said


def draw_preview(
    config: TrainConfig,
    accelerator: Accelerator,
    network: Transformer,
    average: AveragedWeights,
    y: Condition,
    log: RunLog,
    step: int,
) -> None:
    """Samples from the averaged weights: a row a budget (all, half, a quarter, the least), the same noise in each."""
    if not (accelerator.is_main_process or config.fsdp):  # a sharded network needs all processes
        return
    least = network.budgets[0] if network.budgets else None
    shown = dict.fromkeys(resolve_budget(b, network.budgets) for b in (None, 0.5, 0.25, least)) if least else [None]
    with average.in_place_of(network), torch.compiler.set_stance("force_eager"), accelerator.autocast():
        rows = [as_pictures(sample(network, y, budget=budget)[:, :3]) for budget in shown]
    if accelerator.is_main_process:
        preview = image_grid(torch.cat(rows), len(y), scale=max(1, 64 // rows[0].shape[-2]))
        save_image(preview, Path(config.out) / "samples" / f"step-{step:08d}.png")
        log.image(preview, step)


def _names(names: Sequence[str]) -> str:
    """What modules a list of weights belongs to, each once."""
    return ", ".join(dict.fromkeys(name.rpartition(".")[0] or name for name in names)) or "none"
