"""elit play"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from elit.arguments import free_port
from elit.cli.main import check_device
from elit.cli.main import parse as parse_arguments


@dataclass(frozen=True, kw_only=True)
class Args:
    """Open a page on which a model's budget is turned and its pictures are looked at: one picture, two budgets side by
    side, the compute-quality plane, what Read reads. Needs the extra ui.

    It is for this machine alone: it listens on 127.0.0.1, has no password, and is not shared.

    Example: elit play fashion
    """

    model: Annotated[Path | None, tyro.conf.Positional] = None
    """Folder of a saved model, of a pipeline, or of an add-on of elit distill; or a model in the box. Default:
    fashion, or with --service that service's own."""
    service: str | None = None
    """http://HOST:PORT of elit serve: its load has a tab, with a burst to send; without a model its pictures are drawn
    there. Needs the extra serve too."""
    api_key: str | None = None
    """Of the service; default: ELIT_API_KEY of the environment."""
    vae: Path | None = None
    """Folder of the autoencoder that the model was trained in; default: the pipeline's, if `model` is one."""
    port: int = 7860
    """Of the page; 0 takes a free one."""
    host: str = "127.0.0.1"
    """Address to listen on; another than this machine's own needs --expose."""
    expose: bool = False
    """Let other machines open the page. It has no password: whoever reaches it can use this machine."""
    device: str | None = None
    """Such as cuda or cpu; default: cuda where there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the network."""
    browser: bool = True
    """Open a browser, where there is a terminal."""
    json: bool = False
    """Print the page's address as JSON once it is up."""


def parse(arguments: Sequence[str]) -> Args:
    args: Args = parse_arguments(Args, "play", arguments)
    if not 0 <= args.port <= 65535:
        raise ValueError(f"port={args.port}: give 0 to 65535")
    if args.service is None and args.api_key is not None:
        raise ValueError("api_key: is of a service; give --service too")
    if args.host not in ("127.0.0.1", "localhost", "::1") and not args.expose:
        raise ValueError(
            f"host={args.host!r}: the page has no password, so it listens on 127.0.0.1 alone; --expose lets other "
            "machines open it"
        )
    return args


def run(args: Args) -> None:
    import importlib.util
    import json
    import webbrowser

    from elit.play.server import quiet_gradio, serve

    if importlib.util.find_spec("gradio") is None:
        raise ValueError("gradio is not installed; pip install 'elit-diffusion[ui]'")
    quiet_gradio()
    device, port = check_device(args.device), free_port(args.host, args.port)
    monitor = watched(args)

    from elit.elastic.stock import find_stock
    from elit.play.engine import NetworkEngine, PageEngine
    from elit.play.opening import Opening
    from elit.play.pipeline_engine import PipelineEngine
    from elit.pretrained import model_folder, model_name

    engine: PageEngine
    model = args.model or model_folder("fashion")
    name = model_name(model)
    if monitor is not None and args.model is None:
        from elit.play.service_engine import ServiceEngine

        engine = ServiceEngine(monitor.client)
        name = engine.name
    elif (stock := find_stock(model)) is not None:
        engine = PipelineEngine.load(stock, device=device, dtype=args.dtype)
    else:
        engine = NetworkEngine.load(name, vae=args.vae, device=device, dtype=args.dtype)
    opening = Opening(engine)  # at work while Gradio is imported, which takes as long
    from elit.play.page import build_page

    address = f"http://{f'[{args.host}]' if ':' in args.host else args.host}:{port}/"

    def ready() -> None:
        if args.json:
            print(json.dumps({"url": address}), flush=True)
        else:
            who = "whoever reaches this machine" if args.expose else "this machine alone; sharing is off"
            print(f"{address} shows {name}, for {who}. Ctrl-C ends it.", flush=True)
        if args.browser and sys.stdout.isatty():
            webbrowser.open(address)

    serve(build_page(opening, monitor), args.host, port, ready)


def watched(args: Args) -> Any:
    """What reads the load of --service; None without one. Raises ValueError where nothing answers there."""
    import os

    if args.service is None:
        return None
    try:
        from elit.play.service import LoadMonitor, ServiceClient
    except ImportError as error:
        raise ValueError(f"{error.name} is missing; pip install 'elit-diffusion[serve,ui]'") from None
    client = ServiceClient(args.service, args.api_key or os.environ.get("ELIT_API_KEY") or None)
    client.describe()
    return LoadMonitor(client)
