# The public names and their modules: read by type checkers, and by __init__.py, which imports each on its first use.
from elit import flow as flow
from elit._version import __version__ as __version__
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
from elit.models.presets import (
    create_model as create_model,
    list_models as list_models,
    register_model as register_model,
)
from elit.models.sit import SiT as SiT
from elit.models.text import TextEncoder as TextEncoder
from elit.models.uvit import UViT as UViT
from elit.models.windows import InterfaceSpec as InterfaceSpec
from elit.planner.choose import Plan as Plan, plan as plan
from elit.released.load import load_released as load_released
from elit.sampling.pipeline import ElitPipeline as ElitPipeline
from elit.sampling.sample import sample as sample
from elit.sampling.settings import Sampling as Sampling
