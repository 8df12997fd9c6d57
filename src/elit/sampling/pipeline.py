"""ElitPipeline: a network, a scheduler and an optional autoencoder as a diffusers pipeline."""

import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Optional

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin, SchedulerMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from torch import Tensor, nn

from elit.budgets import Budget, Schedule
from elit.compat import execution_device
from elit.config import require
from elit.files import Json, write_text
from elit.flow.guidance import CCFG, CFG
from elit.flow.solver import time_grid
from elit.models.conditioning import Condition
from elit.models.text import embed_prompts
from elit.models.transformer import Transformer
from elit.sampling.autoencoders import decode
from elit.sampling.engine import NetworkEngine
from elit.sampling.settings import STEPS, Sampling, make_sampling


class ElitPipeline(DiffusionPipeline):
    """Sampling with a compute dial, from classes or from text.

    transformer: an elit network. scheduler: FlowMatchEulerDiscreteScheduler, or with use_flow_sigmas one such as UniPC;
    others raise ValueError. vae: a diffusers autoencoder, or None where the network works on pixels. text_encoder,
    tokenizer: transformers' own, where the network was trained on their embeddings.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components: ClassVar = ["vae", "text_encoder", "tokenizer"]
    _callback_tensor_inputs: ClassVar = ["latents"]
    _guidance_scale = 1.0

    def __init__(
        self,
        transformer: Transformer,
        scheduler: SchedulerMixin,
        # diffusers 0.36 reads no `X | None` here
        vae: Optional[ModelMixin] = None,  # noqa: UP045
        text_encoder: Optional[nn.Module] = None,  # noqa: UP045
        tokenizer: Optional[object] = None,  # noqa: UP045
    ):
        super().__init__()
        check_scheduler(scheduler)
        self.register_modules(
            transformer=transformer, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer
        )

    def save_config(self, save_directory: str | Path, *args: object, **kwargs: object) -> None:
        """model_index.json, and the module beside it by which DiffusionPipeline finds this class."""
        write_text(Path(save_directory) / "pipeline.py", "from elit import ElitPipeline as ElitPipeline\n")
        super().save_config(save_directory, *args, **kwargs)

    def to_json_string(self) -> str:
        return super().to_json_string().replace('"ElitPipeline"', '["pipeline", "ElitPipeline"]')

    @classmethod
    def _dict_from_json_file(cls, json_file: str | Path) -> Json:
        found = super()._dict_from_json_file(json_file)  # with that module this class is not loaded
        return found | {"_class_name": "ElitPipeline"} if "_class_name" in found else found

    @property
    def guidance_scale(self) -> float:
        """Scale of the run; a callback changes it by `_guidance_scale`, as in diffusers' own pipelines."""
        return self._guidance_scale

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor | None = None,
        num_inference_steps: int = STEPS,
        guidance_scale: float = 1.0,
        budget: Schedule = None,
        guidance_budget: Budget = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        latents: Tensor | None = None,
        return_dict: bool = True,
        prompt: str | Sequence[str] | None = None,
        prompt_embeds: Condition | None = None,
        cache: float = 0.0,
        dtype: torch.dtype | str | None = None,
        compile: bool = False,
        plan: Sampling | None = None,
        step_budgets: Sequence[Budget] | None = None,
        sample_budgets: Sequence[Budget] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        callback_on_step_end: Callable[["ElitPipeline", int, Any, Json], Json | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        sigmas: Sequence[float] | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Images or clips, one a label of `class_labels`, a `prompt` or a row of `prompt_embeds` (elit.Text).

        guidance_scale: 1 is off. guidance_budget: latents per window of the unconditional branch (CCFG); None = those
        of the main branch (CFG). budget, step_budgets, sample_budgets, cache, dtype, compile: as in `elit.sample`.
        plan: of `elit.plan` or an elit.Sampling, in the place of steps, budgets, guidance and cache.
        height, width: of the picture in pixels, default the network's own. num_images_per_prompt: so many of each
        label or prompt, one after the other.
        generator: one, or one a sample. latents: starting noise (B, C, H, W). output_type: "pil", "np" (B, H, W, C)
        in [0, 1], "pt" (B, C, H, W) in [0, 1], or "latent" (the network's own output). Of clips each image is a list of
        frames, or has its frames behind B. return_dict: False gives a tuple.
        callback_on_step_end: called after every step as callback(pipe, step, timestep, {"latents": latents}); latents
        in the dict that it returns take the place of the state. Once it sets `pipe._interrupt = True` the remaining
        steps are left out; a `pipe._guidance_scale` that it sets guides them.
        callback_on_step_end_tensor_inputs: the keys of the dict, "latents" alone.
        sigmas: noise levels of the steps in the place of even ones, from 1 down; the scheduler shifts them.

        Raises ValueError for labels, budgets and sizes that do not fit the network.
        """
        outputs, inputs = ("pil", "np", "pt", "latent"), callback_on_step_end_tensor_inputs
        require(output_type in outputs, "output_type", output_type, f"one of {outputs}")
        require(set(inputs) <= {"latents"}, "callback_on_step_end_tensor_inputs", inputs, "some of ['latents']")
        model, device = self.transformer, execution_device(self)
        y = self._conditions(class_labels=class_labels, prompt=prompt, prompt_embeds=prompt_embeds)
        y = y[torch.arange(len(y)).repeat_interleave(num_images_per_prompt)]
        if plan is None:
            guidance = CFG(guidance_scale) if guidance_budget is None else CCFG(guidance_scale, guidance_budget)
            budgets = {"budget": budget, "step_budgets": step_budgets, "sample_budgets": sample_budgets}
            plan = make_sampling(Sampling(steps=num_inference_steps, guidance=guidance, cache=cache), **budgets)
        plan = make_sampling(plan, dtype=dtype, steps=None if sigmas is None else len(sigmas))
        require(plan.solver == "euler", "solver", plan.solver, "euler: others are schedulers here")
        engine = NetworkEngine(model, self.vae, compile=compile)

        shape = (len(y), model.config.in_channels, *engine.latent_size(height, width))
        if latents is None:
            count = len(generator) if isinstance(generator, list) else len(y)
            require(count == len(y), "generators", count, f"1, or {len(y)}, one a sample")
            latents = randn_tensor(shape, generator=generator, device=torch.device(device), dtype=torch.float32)
        decided = 2 if (height, width) == (None, None) else len(shape)  # else latents decide about the size
        fits = latents.ndim == len(shape) and latents.shape[:decided] == shape[:decided]
        require(fits, "latents", tuple(latents.shape), f"of shape {shape}")
        times = self._times(plan, sigmas, device, model.token_grid(latents.shape[2:]))
        run = engine.begin(y, (), plan, noise=latents.to(device), times=times)
        self._guidance_scale, self.num_timesteps, self._interrupt = run.scale, run.total, False
        for step, timestep in enumerate(self.progress_bar(self.scheduler.timesteps)):
            if self._interrupt:
                continue  # as in diffusers' pipelines, the bar runs to its end
            (run.velocity,) = engine.velocities([run])
            # Scheduler convention: the derivative in the noise level, noise − data.
            x = self.scheduler.step(-run.velocity, timestep, run.x, return_dict=False)[0]
            if callback_on_step_end is not None:
                x = (callback_on_step_end(self, step, timestep, dict.fromkeys(inputs, x)) or {}).get("latents", x)
                if self._guidance_scale != run.scale:
                    run.guide(self._guidance_scale)
            run.x, run.t, run.steps_done = x, times[step + 1], step + 1

        images: Any = run.x
        if output_type != "latent":
            processor = VideoProcessor()
            finish = processor.postprocess_video if images.ndim == 5 else processor.postprocess
            images = finish(decode(self.vae, images).float(), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _times(self, plan: Sampling, sigmas: Sequence[float] | None, device: Any, grid: Sequence[int]) -> list[float]:
        """Times of the scheduler's steps: it counts noise levels down from 1, the flow counts t up to 1."""
        scheduler, config = self.scheduler, self.scheduler.config
        check_scheduler(scheduler)
        takes, options = inspect.signature(scheduler.set_timesteps).parameters, {}
        require(sigmas is None or "sigmas" in takes, "sigmas", sigmas, f"left out with {type(scheduler).__name__}")
        if config.get("use_dynamic_shifting"):  # by the tokens, as in diffusers' pipelines
            low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
            first, last = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
            options["mu"] = first + (last - first) * (math.prod(grid) - low) / (high - low)
        if "sigmas" in takes:
            even = np.linspace(1, 0, plan.steps, endpoint=False)
            options["sigmas"] = even if sigmas is None else np.array(sigmas, dtype=np.float64)
        else:
            options["num_inference_steps"] = plan.steps
        scheduler.set_timesteps(device=device, **options)
        scheduler.set_begin_index(0)
        times = [1 - sigma for sigma in scheduler.sigmas.tolist()]
        shift = config.get("shift", config.get("flow_shift", 1.0))
        require(plan.shift in (1, shift), "shift", plan.shift, f"that of the scheduler, {shift}")
        exact = time_grid(plan.steps, shift)
        # The scheduler's are float32; the time embedding turns 1000 times.
        return exact if np.allclose(times, exact, atol=1e-6) else times

    def _conditions(self, **given: Any) -> Condition:
        names = [name for name, value in given.items() if value is not None]
        takes = ["prompt", "prompt_embeds"] if self.transformer.takes_text else ["class_labels"]
        good = len(names) == 1 and names[0] in takes
        require(good, "condition", names, f"{' or '.join(takes)} for this network")
        y = given[names[0]]
        if names == ["prompt"] and self.text_encoder is not None:
            prompts, length = [y] if isinstance(y, str) else list(y), self.transformer.config.text_length
            y = embed_prompts(prompts, self.tokenizer, self.text_encoder, length=length)
        return self.transformer.conditioning.prepare(y)


def check_scheduler(scheduler: SchedulerMixin) -> None:
    """Raises ValueError for a scheduler that does not go from noise to data by velocities, one a step."""
    config, name = scheduler.config, type(scheduler).__name__
    good = isinstance(scheduler, FlowMatchEulerDiscreteScheduler) and not config.invert_sigmas
    if config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction":
        good = "Inverse" not in name
    valid = "FlowMatchEulerDiscreteScheduler, or one with use_flow_sigmas=True, prediction_type='flow_prediction'"
    require(good, "scheduler", name, valid)
