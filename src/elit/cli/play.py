"""elit play"""

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from elit.cli.main import check_device, free_port
from elit.cli.options import OfNetwork
from elit.config import require
from elit.serve import LOOPBACK


@dataclass(frozen=True, kw_only=True)
class Args(OfNetwork):
    """Open the playground in the browser: draw pictures at any budget, compare budgets, plan for a target, look inside
    the network. It serves this machine alone and has no password. Needs the extra ui.

    Example: elit play fashion
    """

    model: Annotated[Path | None, tyro.conf.Positional] = None
    """Folder of a saved model, a pipeline or an add-on of elit distill, or a model in the box. Default: the first in
    the box."""
    vae: Path | None = None  # Folder of the autoencoder that the model was trained with. Default: the pipeline's.
    port: int = 7860  # Port of the page; 0 takes a free one.
    host: str = "127.0.0.1"  # Address to listen on; another than this machine's own needs --expose.
    expose: bool = False  # Let other machines open the page: whoever reaches it can use this machine.
    browser: bool = True  # Open a browser, where there is a terminal.

    def __post_init__(self) -> None:
        local = self.expose or self.host in LOOPBACK
        require(local, "host", self.host, "127.0.0.1, since the page has no password; --expose allows others")


def run(args: Args) -> None:
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("gradio is not installed: pip install '.[ui]' in a clone")
    from elit.play.page import open_page, serve

    device, port = check_device(args.device), free_port(args.host, args.port)
    page = open_page(args.model, vae=args.vae, device=device, dtype=args.dtype)
    address = f"http://{f'[{args.host}]' if ':' in args.host else args.host}:{port}/"
    who = "whoever reaches this machine" if args.expose else "this machine alone; sharing is off"
    line = json.dumps({"url": address}) if args.json else f"{address} is open for {who}. Ctrl-C ends it."
    serve(page, args.host, port, line, address if args.browser and sys.stdout.isatty() else None)
