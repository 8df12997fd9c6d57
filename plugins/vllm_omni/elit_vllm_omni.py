"""A pipeline for vLLM-Omni (0.30): requests of one batch, each at its own budget.

vLLM-Omni loads `register` in each of its processes, through the entry point vllm_omni.general_plugins. `extra_args` of
a request may have budget, guidance_budget and seed; the key by which its scheduler forms batches does not have them, so
that requests of all budgets share one.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elit.budgets import resolve_budget
from elit.elastic.engine import load_engine
from elit.flow.guidance import CCFG, CFG
from elit.sampling.engine import Engine
from elit.sampling.settings import Sampling

ARCHITECTURE = "ElitPipeline"  # As in model_index.json.
STEPS = 20


def register() -> None:
    """Registers the pipeline. vLLM-Omni calls it."""
    from vllm_omni.diffusion.registry import register_diffusion_model

    register_diffusion_model(
        ARCHITECTURE,
        __name__,
        "ElitBatchPipeline",
        pre_process_func_name="pre_process",
        post_process_func_name="post_process",
    )


def pre_process(od_config: Any) -> Callable[[Any], Any]:
    """A function that sets the key of a request's batch: all that must be equal in one, so not the budget."""

    def set_key(request: Any) -> Any:
        prompt = request.prompt
        negative = None if isinstance(prompt, str) else prompt.get("negative_prompt")
        request.batch_compatibility_key = ("elit", bool(negative))
        return request

    return set_key


def post_process(od_config: Any) -> Callable[[Tensor], Any]:
    """A function from pixels (B, C, H, W) in [-1, 1] to PIL pictures."""
    from diffusers.image_processor import VaeImageProcessor

    return VaeImageProcessor(vae_scale_factor=1).postprocess


class ElitBatchPipeline(nn.Module):
    """A saved network or ElitPipeline. All images of a batch are stepped together, each at its request's budget."""

    supports_request_batch = True
    supports_step_execution = False

    def __init__(self, *, od_config: Any, prefix: str = ""):
        super().__init__()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = str(od_config.dtype).removeprefix("torch.")
        self.engine: Engine = load_engine(Path(od_config.model), device=device, dtype=dtype, exact=False)
        self.network = self.engine.network

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Nothing: the constructor has loaded them."""

    def sampling(self, params: Any) -> Sampling:
        """The settings of one request. Raises ValueError for an invalid budget."""
        extra: Mapping[str, Any] = params.extra_args or {}
        budgets = self.engine.budgets
        scale = params.guidance_scale if params.guidance_scale_provided else self.engine.default_scale
        weak = extra.get("guidance_budget")
        guidance = None if scale == 1 else CFG(scale) if weak is None else CCFG(scale, resolve_budget(weak, budgets))
        budget = resolve_budget(extra.get("budget"), budgets)
        return Sampling(steps=params.num_inference_steps or STEPS, budget=budget, guidance=guidance)

    @torch.no_grad()
    def forward(self, req: Any) -> list[Any]:
        """One output a request, in their order. req: a DiffusionRequestBatch."""
        from vllm_omni.diffusion.data import DiffusionOutput

        runs = []
        for request in req.requests:
            params, prompt = request.sampling_params, request.prompt
            text = prompt if isinstance(prompt, str) else prompt["prompt"]
            negative = "" if isinstance(prompt, str) else prompt.get("negative_prompt") or ""
            size = (params.width, params.height) if params.width and params.height else None
            seed = (params.extra_args or {}).get("seed", params.seed) or 0
            seeds = range(seed, seed + params.num_outputs_per_prompt)
            conditions = self.engine.conditions([text])
            options: dict[str, Any] = {"size": None if size == self.engine.size else size, "negatives": [negative]}
            runs.append([self.engine.begin(conditions, [each], self.sampling(params), **options) for each in seeds])
        together = [run for each in runs for run in each]
        while due := [run for run in together if not run.done]:
            self.engine.step(due)
            if error := next((run.error for run in due if run.error is not None), None):
                raise error
        return [DiffusionOutput(output=torch.cat([run.pictures() for run in each])) for each in runs]
