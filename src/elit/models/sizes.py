"""What a network is made of, checked before it is built: torch's own refusals are many lines long."""

from collections.abc import Mapping
from typing import Any

from elit.arguments import real_number, shortened, whole_number
from elit.models.layout import InterfaceSpec

LEAST = {
    **dict.fromkeys(("in_channels", "num_classes", "depth", "hidden_size", "num_heads"), 1),
    **{"text_features": 1, "text_length": 1, "pooled_features": 0},
}
"""The whole numbers among a network's settings, and the least that each may be."""
MOST = 1 << 20
"""More than any network has of anything."""


def plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers among a network's settings, as Python's own. Raises ValueError for the first that cannot be."""
    plain: dict[str, Any] = {}
    for name, least in LEAST.items():
        if name in settings:
            plain[name] = whole_number(name, settings[name], least, MOST)
    if "mlp_ratio" in settings:
        plain["mlp_ratio"] = real_number("mlp_ratio", settings["mlp_ratio"], above=0, most=MOST)
    for name in ("text_encoder", "convention"):
        if not isinstance(settings.get(name, ""), str):
            raise ValueError(f"{name}={shortened(settings[name])}: give a name")
    interface = settings.get("interface")
    if not (interface is None or isinstance(interface, InterfaceSpec | Mapping)):
        raise ValueError(f"interface={shortened(interface)}: give an elit.InterfaceSpec, or None for none")
    if isinstance(interface, Mapping) and set(interface) != {"split", "window", "num_latents"}:
        raise ValueError(f"interface={shortened(interface)}: give split, window and num_latents")
    return plain
