"""The classes known to `elit.elastify`, by name; `elit.register_family` adds to them."""

from typing import Any

from torch import nn

from elit.elastic.families.family import Family
from elit.elastic.families.flux import CHROMA, FLUX, FLUX2
from elit.elastic.families.images import DIT, OWN_DIT, PIXART, SD3
from elit.elastic.families.qwen import QWEN, QWEN21
from elit.elastic.families.single_stream import LUMINA2, Z_IMAGE
from elit.elastic.families.video import COGVIDEOX, HUNYUAN15, LTX2, WAN_VACE, WAN_VIDEO

FAMILIES: dict[str, Family] = {
    "DiTTransformer2DModel": DIT,
    "QwenImageTransformer2DModel": QWEN,
    "QwenImage21Transformer2DModel": QWEN21,
    "FluxTransformer2DModel": FLUX,
    "Flux2Transformer2DModel": FLUX2,
    "ChromaTransformer2DModel": CHROMA,
    "SD3Transformer2DModel": SD3,
    "PixArtTransformer2DModel": PIXART,
    "ZImageTransformer2DModel": Z_IMAGE,
    "Lumina2Transformer2DModel": LUMINA2,
    "WanTransformer3DModel": WAN_VIDEO,
    "WanVACETransformer3DModel": WAN_VACE,
    "CogVideoXTransformer3DModel": COGVIDEOX,
    "HunyuanVideo15Transformer3DModel": HUNYUAN15,
    "LTX2VideoTransformer3DModel": LTX2,
    "DiT": OWN_DIT,
}

_LINEAR = "its attention is linear, so fewer tokens save little, and its convolutions run over the whole grid"
_ALTERNATING = "its blocks attend within a frame and within a place in turn, which needs all tokens of both"
_NO_GRID = "its tokens are not those of a picture, so there is no grid to cut into windows"
UNSUITABLE: dict[str, str] = {
    "SanaTransformer2DModel": _LINEAR,
    "SanaVideoTransformer3DModel": _LINEAR,
    "SanaControlNetModel": _LINEAR,
    "LatteTransformer3DModel": _ALTERNATING,
    "TransformerTemporalModel": _ALTERNATING,
    "PriorTransformer": _NO_GRID,
    "StableAudioDiTModel": _NO_GRID,
    "T5FilmDecoder": _NO_GRID,
}
"""Classes of diffusers where a dial on tokens makes no sense, and why."""


CLASSES: dict[str, Any] = {}
"""Those that were registered, by name: `elit.load_elastic` makes transformers of them."""


def register_family(kind: type[nn.Module], family: Family) -> None:
    """Makes transformers of the class `kind` known to `elit.elastify` and `elit.load_elastic`, by the class's name.

    family: an `elit.Family`; `elit.check_family` tests it. Raises ValueError for a name that is taken.
    """
    name = kind.__name__
    if FAMILIES.get(name, family) is not family:
        raise ValueError(f"cannot register a second family for {name}")
    FAMILIES[name], CLASSES[name] = family, kind


def family_of(transformer: object) -> Family:
    """The entry for a transformer's class. Raises ValueError where there is none."""
    # Sharding puts a class of torch's in front.
    names = [kind.__name__ for kind in type(transformer).__mro__]
    name = next((name for name in names if name in FAMILIES), names[0])
    if name in UNSUITABLE:
        raise ValueError(f"cannot elastify a {name}: {UNSUITABLE[name]}")
    if name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"cannot elastify a {name}: give its class to elit.register_family, or one of {known}")
    return FAMILIES[name]


def all_blocks(transformer: nn.Module) -> list[nn.Module]:
    """All blocks in the order in which forward runs them."""
    return [block for name in family_of(transformer).blocks for block in getattr(transformer, name)]
