"""ELIT, the Elastic Latent Interface Transformer: diffusion transformers with a compute dial.

Names are imported on first use: `import elit` loads neither torch nor diffusers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from elit._version import __version__ as __version__

_NAMES = {
    "elit.budgets": "draw_budget",
    "elit.costs.flops": "count_flops count_interface_flops",
    "elit.elastic.check": "check_family",
    "elit.elastic.context": "budget",
    "elit.elastic.families": "register_family",
    "elit.elastic.families.family": "Family",
    "elit.elastic.load": "load_elastic load_model",
    "elit.elastic.surgery": "elastify unload_elastic",
    "elit.flow.guidance": "AG CCFG CFG",
    "elit.models.conditioning": "Text",
    "elit.models.dit": "DiT",
    "elit.models.hdit": "HDiT",
    "elit.models.interface": "LatentInterface",
    "elit.models.mmdit": "MMDiT",
    "elit.models.presets": "create_model list_models",
    "elit.models.sit": "SiT",
    "elit.models.text": "TextEncoder",
    "elit.models.uvit": "UViT",
    "elit.models.windows": "InterfaceSpec",
    "elit.planner.choose": "Plan plan",
    "elit.released.load": "load_released",
    "elit.sampling.pipeline": "ElitPipeline",
    "elit.sampling.sample": "sample",
    "elit.sampling.settings": "Sampling",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_HOME)  # pyrefly: ignore[unresolvable-dunder-all]

if TYPE_CHECKING:
    from elit import flow as flow
    from elit.budgets import draw_budget as draw_budget
    from elit.costs.flops import count_flops as count_flops, count_interface_flops as count_interface_flops
    from elit.elastic.check import check_family as check_family
    from elit.elastic.context import budget as budget
    from elit.elastic.families import register_family as register_family
    from elit.elastic.families.family import Family as Family
    from elit.elastic.load import load_elastic as load_elastic, load_model as load_model
    from elit.elastic.surgery import elastify as elastify, unload_elastic as unload_elastic
    from elit.flow.guidance import AG as AG, CCFG as CCFG, CFG as CFG
    from elit.models.conditioning import Text as Text
    from elit.models.dit import DiT as DiT
    from elit.models.hdit import HDiT as HDiT
    from elit.models.interface import LatentInterface as LatentInterface
    from elit.models.mmdit import MMDiT as MMDiT
    from elit.models.presets import create_model as create_model, list_models as list_models
    from elit.models.sit import SiT as SiT
    from elit.models.text import TextEncoder as TextEncoder
    from elit.models.uvit import UViT as UViT
    from elit.models.windows import InterfaceSpec as InterfaceSpec
    from elit.planner.choose import Plan as Plan, plan as plan
    from elit.released.load import load_released as load_released
    from elit.sampling.pipeline import ElitPipeline as ElitPipeline
    from elit.sampling.sample import sample as sample
    from elit.sampling.settings import Sampling as Sampling


def __getattr__(name: str) -> Any:
    if name == "flow":  # functions of tensors, a room of their own
        return import_module("elit.flow")
    if name not in _HOME:
        raise AttributeError(f"module 'elit' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
