"""A service in this process, without Ray: the app, and a replica behind it, on a real port of 127.0.0.1."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import uvicorn

import elit
from elit.serve.api import make_app
from elit.serve.replica import Replica, load_replica
from elit.serve.settings import ServiceSettings

PRICES = {"run": 1, "image": 3, "call": 2, "core": 0.5, "around": 4, "linear": 5, "attention": 0}
ANATOMY = {"around": 1.5, "linear": 0.1, "square": 0.0, "budgets": [1, 2, 3, 4]}
COST = {"prices": PRICES, "overlapping": False}
PROFILE = {"recipe": {}, "rows": [], "rounds": 0, "cost": COST, "anatomy": ANATOMY}
"""A profile as elit profile might measure it of `saved_model`, in a file."""


def saved_model(folder: Path) -> Path:
    torch.manual_seed(0)
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "ankle boot"]
    sizes = {"sample_size": 8, "in_channels": 1, "num_classes": 10, "hidden_size": 48, "num_heads": 4, "depth": 4}
    model = elit.create_model("ELIT-DiT-S/2", class_names=names, split=(1, 2, 1), window=(2, 2), **sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def row(budget, steps, fd, guidance="none", scale=1.0, weak=None, digest=""):
    setting = {"budget": str(budget), "steps": steps, "guidance": guidance, "scale": scale, "guidance_budget": weak}
    setting |= {"share": 1.0, "gflops": 1.0, "ms": 1.0, "saturation": 0.0, "recipe_sha256": "", "file": ""}
    return setting | {"count": 100, "detector": "digits", "model_sha256": digest, "fd": fd}


@contextmanager
def served(
    service: ServiceSettings, key: str | None = None, replica: Replica | None = None
) -> Iterator[tuple[str, Replica, Any]]:
    """URL, replica and app of a running service. replica: default that of a `saved_model`, with `PROFILE` as its costs,
    or each service would measure for four seconds first."""
    if replica is None:
        profile = service.model.with_name("profile.json")
        profile.write_text(json.dumps(PROFILE))
        replica = load_replica(replace(service, profile=profile))
    app = make_app(service, replica, key=key)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{port}", replica, app
    finally:
        server.should_exit = True
        thread.join(10)
