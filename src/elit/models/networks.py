"""The network classes by name: what a config.json's `_class_name` means."""

from elit.models.dit import DiT
from elit.models.hdit import HDiT
from elit.models.mmdit import MMDiT
from elit.models.sit import SiT
from elit.models.transformer import Transformer
from elit.models.uvit import UViT

NETWORKS: dict[str, type[Transformer]] = {kind.__name__: kind for kind in (DiT, UViT, HDiT, MMDiT, SiT)}
