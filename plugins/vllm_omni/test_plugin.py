"""The plug-in for vLLM-Omni, whose own modules are stubs here: it needs a GPU. See docs/serving.md for what was run."""

import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from service import saved_model

import elit

FOLDER = Path(__file__).parent


@dataclass
class Params:
    seed: int
    extra_args: dict[str, Any] = field(default_factory=dict)
    num_inference_steps: int | None = 3
    guidance_scale: float = 1.0
    guidance_scale_provided: bool = False
    num_outputs_per_prompt: int = 1
    width: int | None = None
    height: int | None = None


@pytest.fixture
def plugin(monkeypatch):
    registered = []
    stubs: dict[str, ModuleType] = {name: ModuleType(name) for name in ("vllm_omni", "vllm_omni.diffusion")}
    data, registry = ModuleType("vllm_omni.diffusion.data"), ModuleType("vllm_omni.diffusion.registry")
    data.DiffusionOutput = lambda output: SimpleNamespace(output=output)
    registry.register_diffusion_model = lambda *names, **more: registered.append((names, more))
    for name, module in (stubs | {data.__name__: data, registry.__name__: registry}).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.syspath_prepend(str(FOLDER))
    import elit_vllm_omni

    yield elit_vllm_omni, registered
    sys.modules.pop("elit_vllm_omni")


def test_the_entry_point_registers_the_pipeline(plugin):
    module, registered = plugin
    points = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]["entry-points"]
    assert points == {"vllm_omni.general_plugins": {"elit": "elit_vllm_omni:register"}}
    module.register()
    ((architecture, name, kind), functions) = registered[0]
    assert (architecture, name) == ("ElitPipeline", "elit_vllm_omni")
    assert getattr(module, kind).supports_request_batch
    assert all(callable(getattr(module, each)) for each in functions.values())


def test_a_batch_of_three_budgets_is_what_each_is_alone(plugin, tmp_path):
    module, _ = plugin
    config = SimpleNamespace(model=str(saved_model(tmp_path / "digits")), dtype=torch.float32)
    pipeline = module.ElitBatchPipeline(od_config=config)
    extra = [{"budget": 1}, {"budget": "50%"}, {"budget": 4, "guidance_budget": 1}]
    requests = [SimpleNamespace(prompt=str(i), sampling_params=Params(i, given)) for i, given in enumerate(extra)]
    requests[2].sampling_params.guidance_scale, requests[2].sampling_params.guidance_scale_provided = 2.0, True
    requests[0].sampling_params.num_outputs_per_prompt = 2
    outputs = pipeline(SimpleNamespace(requests=requests))
    model = elit.load_model(config.model)
    settings = [{"budget": 1}, {"budget": 2}, {"budget": 4, "guidance": elit.CCFG(2.0, 1)}]
    for number, (output, setting) in enumerate(zip(outputs, settings, strict=True)):
        alone = elit.sample(model, [number], steps=3, seed=number, **setting)
        torch.testing.assert_close(output.output[:1], alone, rtol=0, atol=1e-4)
    assert [len(each.output) for each in outputs] == [2, 1, 1]
    key = module.pre_process(config)
    assert len({key(each).batch_compatibility_key for each in requests}) == 1
    with pytest.raises(ValueError, match="budget must be"):
        pipeline.sampling(Params(0, {"budget": 9}))
