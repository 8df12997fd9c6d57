"""Training: one straight loop on accelerate (paper section 3)."""

import random
import shutil
import signal
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from elit.budgets import draw_budget, resolve_budget, training_budgets
from elit.checkpoint import check_checkpoint, checkpoint_step, checkpoints, load_shared_weights, save_model
from elit.config import TrainConfig, load_config, save_config
from elit.data.digits import digits, moving_digits
from elit.data.images import ImageData, ImageFolder, as_pictures, image_grid, save_image
from elit.data.latents import LatentSet, posterior_sample
from elit.data.order import StepSampler, batch_slice
from elit.data.text import CACHE, PromptedImages, encode_prompts
from elit.flow.path import flow_matching_loss, interpolate, logit_normal
from elit.models.conditioning import Condition, Text
from elit.models.mmdit import MMDiT
from elit.models.presets import create_model, model_config
from elit.models.transformer import Transformer
from elit.runlog import RunLog
from elit.sampling import sample

T = TypeVar("T")
# What a resumed run may change: none of it alters the numbers of a step.
FREE_ON_RESUME = {
    *("resume", "steps", "out", "workers", "init", "log_every", "preview_every"),
    *("checkpoint_every", "keep_last", "keep_every"),
}


def train(config: TrainConfig) -> Transformer:
    """Trains and saves `config.out`/model (averaged weights); returns that network, on the CPU or its device.

    With `resume` it goes on from the newest complete checkpoint, to numbers equal to an uninterrupted run's. On SIGTERM
    it saves one after the step it is at and leaves with SystemExit(0).
    Raises ValueError where the settings do not fit each other, the data or the folder.
    """
    out = Path(config.out)
    AcceleratorState._reset_state()  # a process may train twice, the second time in another precision
    accelerator = Accelerator(
        mixed_precision="bf16" if config.precision == "bf16" else "no",
        cpu=not torch.accelerator.is_available(),  # else processes started by torchrun would not find each other
        log_with="tensorboard",
        project_dir=out,
    )
    data = load_data(config)
    with accelerator.main_process_first():
        prompts = load_prompts(config, data, accelerator.device)
    config = resolve(config, data, prompts)
    resumed, ignored = find_checkpoint(config)
    rank, world, parts = accelerator.process_index, accelerator.num_processes, config.gradient_accumulation
    sampler = StepSampler(
        len(data),
        seed=config.seed,
        batch_size=config.batch_size,
        parts=parts,
        rank=rank,
        world=world,
        stop=config.steps,
    )
    set_seed(config.seed)
    model = create_model(**config.model.chosen())
    started_from = load_shared_weights(model, config.init) if config.init and not resumed else None
    budgets = training_budgets(model.budgets, config.budget_min, config.budget_max)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    network: Transformer = accelerator.unwrap_model(model)
    ema = EMAModel(network.parameters(), decay=config.ema_decay, foreach=True)
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema)
    if resumed:
        accelerator.load_state(str(resumed))
        sampler.start = checkpoint_step(resumed)
    if accelerator.is_main_process:
        save_config(replace(config, resume=False), out / "config.yaml")
    log = RunLog(config, accelerator, start=sampler.start)
    for reason in ignored:
        log.say(f"ignored: {reason}")
    if started_from:
        new, left_out = started_from
        log.say(f"init: {len(new)} weights start anew ({_names(new)}); {len(left_out)} left out ({_names(left_out)})")
    if skipped := getattr(data, "skipped", None):
        log.say(f"left out {len(skipped)} unreadable images, {str(skipped[0])!r} for one")

    examples = data if prompts is None else PromptedImages(data, prompts)
    numbers = torch.arange(8) % len(data.classes)
    shown = numbers if prompts is None else prompts[numbers]
    batches = iter(DataLoader(examples, batch_sampler=sampler, num_workers=config.workers, collate_fn=_as_is))  # type: ignore[arg-type]
    model.train()
    with log.progress(), Termination(accelerator) as termination:
        for step in range(sampler.start, config.steps):
            budget = draw_budget(config.seed, step, budgets)
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * min(1.0, (step + 1) / max(config.warmup_steps, 1))
            noise, t, dropped = draw_step(config, step, data.shape, accelerator.device)
            latents = isinstance(data, LatentSet)
            posterior = draw_posterior(config, step, data.shape, accelerator.device) if latents else None

            loss = torch.zeros((), device=accelerator.device)
            for part in range(parts):
                images, y = (value.to(accelerator.device, non_blocking=True) for value in next(batches))
                rows = batch_slice(config.batch_size, parts, world, part, rank)
                y = network.without_condition(y, dropped[rows])
                if posterior is not None:
                    images = posterior_sample(images, posterior[rows])
                x = interpolate(noise[rows], images, t[rows])
                with accelerator.no_sync(model) if part < parts - 1 else nullcontext():
                    velocity = model(x, t[rows], y, budget)
                    part_loss = flow_matching_loss(velocity, noise[rows], images).mean() / parts
                    accelerator.backward(part_loss)
                loss += part_loss.detach()
            gradient_norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            ema.step(network.parameters())

            done, end, stop = step + 1, step + 1 == config.steps, termination.asked()
            log.add(done, loss=loss, gradient_norm=gradient_norm, budget=budget, lr=optimizer.param_groups[0]["lr"])
            if config.preview_every and (done % config.preview_every == 0 or end) and accelerator.is_main_process:
                preview = draw_preview(network, ema, shown)
                save_image(preview, out / "samples" / f"step-{done:08d}.png")
                log.image(preview, done)
            if done % config.checkpoint_every == 0 or end or stop:
                log.flush()
                save_checkpoint(accelerator, config, done)
            if stop and not end:
                log.say(f"stopped by SIGTERM after step {done:,}, checkpoint saved; set resume to go on")
                accelerator.end_training()
                raise SystemExit(0)

    network = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    ema.copy_to(network.parameters())
    network.eval()
    if accelerator.is_main_process:
        save_model(network, out / "model")
    accelerator.end_training()
    return network


def load_data(config: TrainConfig) -> ImageData:
    """The data set a run trains on."""
    if config.data == "digits":
        return digits()
    if config.data == "moving-digits":
        return moving_digits()
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


def find_checkpoint(config: TrainConfig) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, to go on from, and what is wrong with newer ones.

    Raises ValueError where the folder and `resume` do not agree, or none of its checkpoints is whole.
    """
    out = Path(config.out)
    found = checkpoints(out / "checkpoints")
    if not config.resume:
        if found:
            raise ValueError(
                f"out={config.out!r}: holds a run at step {checkpoint_step(found[-1])}; set resume to go on, or give "
                "another folder"
            )
        return None, []
    if not found:
        return None, []
    before = load_config(out / "config.yaml")
    changed = [
        name for name in vars(config) if name not in FREE_ON_RESUME and getattr(config, name) != getattr(before, name)
    ]
    if changed:
        was = ", ".join(f"{name} was {getattr(before, name)!r}" for name in changed)
        raise ValueError(f"resume: {', '.join(changed)} changed since the run in {config.out!r} began ({was})")
    if checkpoint_step(found[-1]) > config.steps:
        raise ValueError(f"steps={config.steps}: the run in {config.out!r} is at step {checkpoint_step(found[-1])}")
    ignored: list[str] = []
    for path in reversed(found):
        try:
            check_checkpoint(path)
        except ValueError as error:
            ignored.append(str(error))
        else:
            return path, ignored
    raise ValueError(ignored[0])


class Termination:
    """Notices SIGTERM, and has all processes notice it at the same step."""

    def __init__(self, accelerator: Accelerator):
        self.accelerator, self.seen = accelerator, False
        self.before: Any = signal.SIG_DFL

    def __enter__(self) -> "Termination":
        if threading.current_thread() is threading.main_thread():
            self.before = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.before)

    def asked(self) -> bool:
        """Whether to stop, once a step."""
        if self.accelerator.num_processes == 1:
            return self.seen
        if self.seen:
            self.accelerator.set_trigger()
        return self.accelerator.check_trigger()

    def _notice(self, *_: object) -> None:
        self.seen = True


def save_checkpoint(accelerator: Accelerator, config: TrainConfig, step: int) -> None:
    """Everything needed to resume after `step` steps, complete or not there at all; drops old ones as config says."""
    folder = Path(config.out) / "checkpoints"
    target = folder / f"step-{step:08d}"
    temporary = folder / f".{target.name}.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if target.exists():  # a damaged one, passed over when the run went on
            shutil.rmtree(target)
        temporary.replace(target)
        for old in checkpoints(folder)[: -config.keep_last]:
            if not config.keep_every or checkpoint_step(old) % config.keep_every:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()


def draw_preview(network: Transformer, ema: EMAModel, y: Condition) -> Image.Image:
    """Samples from the averaged weights: a row a budget (all, half, a quarter, the least), the same noise in each."""
    ema.store(network.parameters())
    ema.copy_to(network.parameters())
    least = network.budgets[0] if network.budgets else None
    shown = dict.fromkeys(resolve_budget(b, network.budgets) for b in (None, 0.5, 0.25, least)) if least else [None]
    rows = [as_pictures(sample(network, y, budget=budget)[:, :3]) for budget in shown]
    ema.restore(network.parameters())
    return image_grid(torch.cat(rows), len(y), scale=max(1, 64 // rows[0].shape[-2]))


def _names(names: Sequence[str]) -> str:
    """What modules a list of weights belongs to, each once."""
    return ", ".join(dict.fromkeys(name.rpartition(".")[0] or name for name in names)) or "none"


def _as_is(batch: T) -> T:
    return batch
