"""Outputs to the bit as they were before the library was made smaller: `bit-equal.safetensors` has them.

`python tests/test_bit_equal.py` (with tests and studies/pipelines on the path) writes the file anew. It notes the
processor and the version of torch: elsewhere sums are taken in another order, and outputs are equal within rounding.
"""

import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import inputs, opened
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import build, inputs as elastic_inputs, open_branches, window
from torch import Tensor

import elit
from elit.flow.path import flow_matching_loss

FILE = Path(__file__).with_name("bit-equal.safetensors")
UNEVEN = {"elit-dit": (18, 22), "elit-uvit": (18, 14), "elit-hdit": (22, 14), "elit-mmdit": (18, 14)}
UNEVEN |= {"elit-dit-video": (3, 10, 6)}
BACKBONES = [*UNEVEN, "elit-sit"]
ELASTIC = ["FluxTransformer2DModel", "QwenImageTransformer2DModel", "WanTransformer3DModel"]


def parts(model, budgets: list[int], *, share_head: bool = False) -> Tensor:
    x, t, y = inputs(model, batch=4)
    return model(x, t, y, budgets, share_head=share_head)


def forwards(kind: str, size: tuple[int, ...] | None) -> Tensor:
    model = opened(kind)
    x, t, y = inputs(model, batch=2, size=size)
    levels = model.budgets[-1], model.budgets[len(model.budgets) // 2], model.budgets[0]
    return torch.stack([model(x, t, y, budget) for budget in levels])


def mixed(kind: str) -> Tensor:
    model = opened(kind)
    low, high = model.budgets[0], model.budgets[-1]
    different = [parts(model, [high, low]), parts(model, [low, high, low, model.budgets[1]])]
    return torch.stack([*different, *parts(model, [high, low], share_head=True).chunk(2)])


def training_step(kind: str) -> Tensor:
    model = opened(kind).train()
    x, t, y = inputs(model, batch=2)
    with torch.enable_grad():
        loss = flow_matching_loss(model(x, t, y, model.budgets[1]), x.flip(0), x).mean()
        loss.backward()
    norm = torch.nn.utils.get_total_norm([each.grad for each in model.parameters() if each.grad is not None])
    return torch.stack([loss.detach(), norm])


def sampled() -> Tensor:
    model, settings = opened("elit-dit"), {"steps": 3, "budget": 0.5}
    guidance = elit.CFG(1.5), elit.AG(2.0, 2), elit.CCFG(3.0, 1)
    return torch.stack([elit.sample(model, [1, 3], guidance=each, **settings) for each in guidance])


def elastified(kind: str) -> Tensor:
    model = elit.elastify(build(kind), read_after=1, write_after=3, window=window(kind))
    open_branches(model)
    outputs = []
    for budget in (16, 6, 1):
        with elit.budget(budget):
            outputs.append(model(**elastic_inputs(kind), return_dict=False)[0])
    return torch.stack(outputs)


def boxed() -> Tensor:
    return elit.sample(elit.load_model("fashion"), ["sneaker"], steps=3, guidance=elit.CCFG(2.0, 1), seed=0)


CASES: dict[str, Callable[[], Tensor]] = {
    **{f"forwards of {kind}": partial(forwards, kind, None) for kind in BACKBONES},
    **{f"forwards of {kind}, uneven": partial(forwards, kind, size) for kind, size in UNEVEN.items()},
    **{f"budgets in one batch of {kind}": partial(mixed, kind) for kind in ("elit-dit", "elit-mmdit", "elit-sit")},
    **{f"training step of {kind}": partial(training_step, kind) for kind in BACKBONES},
    "samples": sampled,
    **{f"elastified {kind}": partial(elastified, kind) for kind in ELASTIC},
    "the model in the box": boxed,
}


@torch.no_grad()
def outputs_of(case: str) -> Tensor:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return CASES[case]()
    finally:
        torch.set_num_threads(threads)


def processor() -> dict[str, str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else [platform.processor()]
    same = [line.partition(":")[2].strip() for line in lines if line.startswith(("cpu family", "model", "stepping"))]
    capability = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "capability": capability, "processor": " ".join(sorted(set(same)))}


@pytest.mark.parametrize("case", CASES)
def test_outputs_are_what_they_were(case):
    with safe_open(FILE, "pt") as file:
        expected, recorded = file.get_tensor(case), file.metadata()
    output = outputs_of(case)
    if recorded == processor():
        assert torch.equal(output, expected)
    else:
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    save_file({case: outputs_of(case) for case in CASES}, FILE, processor())
