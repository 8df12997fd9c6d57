"""The plug-in against the classes of an unpacked wheel of vLLM-Omni, without vLLM: that is stubbed, and said.

    pip download vllm-omni==0.30.0 --no-deps && unzip -q vllm_omni-*.whl -d wheel
    python plugins/vllm_omni/check.py wheel MODEL

MODEL is a saved network of classes. Real are vLLM-Omni's requests, sampling parameters, request batch, outputs,
registry and the key of its request scheduler. vLLM and vLLM-Omni's platforms and quantization are stubs; no engine,
no worker and no GPU runs.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, TypedDict
from unittest.mock import MagicMock

import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline

import elit

sys.path.insert(0, str(Path(__file__).parent))
import elit_vllm_omni as plugin

REAL_FIRST = (transformers.PreTrainedModel, AutoencoderKL, DiffusionPipeline)  # They look for vLLM's neighbours.


class Stub(ModuleType):
    """A module with every name: lists for constants, typed dicts for prompts, empty classes, mocks for functions."""

    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value: Any = MagicMock(name=name)
        if name.isupper():
            value = []
        elif name.endswith(("Prompt", "Inputs", "Dict")):
            value = TypedDict(name, {})  # noqa: UP013 (the name is a variable)
        elif name[0].isupper():
            value = type(name, (), {"__class_getitem__": classmethod(lambda cls, item: cls)})
        setattr(self, name, value)
        return value


class Stubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds vLLM's modules."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] == "vllm" else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def main(wheel: Path, model: Path) -> None:
    sys.meta_path.append(Stubs())
    for name in ("vllm_omni", "vllm_omni.diffusion", "vllm_omni.diffusion.worker", "vllm_omni.diffusion.sched"):
        package = sys.modules[name] = ModuleType(name)  # without its __init__, which starts the engine
        package.__path__ = [str(wheel / name.replace(".", "/"))]
    for name in ("vllm_omni.platforms", "vllm_omni.quantization"):
        sys.modules[name] = Stub(name)
    from vllm_omni.diffusion import registry
    from vllm_omni.diffusion.request import OmniDiffusionRequest
    from vllm_omni.diffusion.sched.request_scheduler import build_request_batch_sampling_params_key
    from vllm_omni.diffusion.worker.request_batch import DiffusionRequestBatch
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams

    plugin.register()
    print("registered:", registry._DIFFUSION_MODELS[plugin.ARCHITECTURE])
    config = SimpleNamespace(model=str(model), dtype=torch.float32)
    pipeline, pre_process, requests = plugin.ElitBatchPipeline(od_config=config), plugin.pre_process(config), []
    budgets = (pipeline.engine.budgets[0], "50%", pipeline.engine.budgets[-1])
    for place, budget in enumerate(budgets):
        params = OmniDiffusionSamplingParams(seed=place, num_inference_steps=4, extra_args={"budget": budget})
        requests.append(
            pre_process(OmniDiffusionRequest(prompt=str(place), sampling_params=params, request_id=str(place)))
        )
    keys = {build_request_batch_sampling_params_key(each) for each in requests}
    outputs, network = pipeline(DiffusionRequestBatch(requests=requests)), pipeline.network
    for place, (budget, output) in enumerate(zip(budgets, outputs, strict=True)):
        alone = elit.sample(network, [place], steps=4, seed=place, budget=budget)
        apart = (output.output - alone).abs().max().item()
        print(f"budget {budget}: {tuple(output.output.shape)}, from elit.sample at most {apart:.1e}")
    print("one batch:", len(keys) == 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
