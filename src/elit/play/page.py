"""The page, controls on one side and tabs on the other, behind a web server that lets in nothing from other hosts."""

import asyncio
import socket
import threading
import webbrowser
from pathlib import Path
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response

from elit.elastic.engine import load_engine
from elit.play.playground import Playground, build_controls
from elit.play.renderer import Renderer
from elit.play.tabs import build_compare, build_dial, build_inside, build_plane
from elit.pretrained import DEFAULT, model_folder, model_name
from elit.sampling.engine import NetworkEngine
from elit.serve import LOOPBACK

CSS, NAME_PICTURES = (Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; frame-ancestors 'self'; form-action 'self'; base-uri 'self'"
)  # Browsers contact no other host, whatever the page contains.
CLOSED = ("/gradio_api/upload", "/gradio_api/proxy", "/gradio_api/component_server")  # Gradio's; the page has no use.


def open_page(model: Path | None, *, vae: Path | None, device: str, dtype: str) -> gr.Blocks:
    """The page of a model, by default the box's first. Raises ValueError."""
    folder = model_folder(model or DEFAULT)
    engine = load_engine(folder, name=model_name(folder), vae=vae, device=device, dtype=dtype)
    renderer = Renderer(engine, dtype)
    threading.Thread(target=renderer.thumbnails, daemon=True).start()
    return build_page(renderer)


def build_page(renderer: Renderer) -> gr.Blocks:
    play = Playground(renderer)
    with gr.Blocks(title="elit playground", analytics_enabled=False, delete_cache=(1800, 3600)) as page:
        text = f"# Playground\nAll pictures come from the same weights: {play.engine.name}. The budget is the number "
        gr.Markdown(text + "of latents that the middle of the network works on. Fewer latents cost less.")
        present = gr.State(None)
        with gr.Row(elem_classes="sides"):
            with gr.Column(scale=5, min_width=320):
                controls = build_controls(play)
            with gr.Column(scale=7, min_width=320), gr.Tabs():
                with gr.Tab("Dial"):
                    build_dial(page, play, controls, present)
                if play.engine.budgets:
                    with gr.Tab("Compare") as tab:
                        build_compare(play, controls, tab)
                if isinstance(play.engine, NetworkEngine):
                    with gr.Tab("Plane") as tab:
                        build_plane(play, controls, tab, present)
                    if play.engine.network.latent_interface is not None:
                        with gr.Tab("Inside") as tab:
                            build_inside(play, play.engine, controls, tab, present)
        page.queue(default_concurrency_limit=4, max_size=64)
        page.unload(play.cancel)
        page.load(None, js=NAME_PICTURES, api_visibility="private")
    return page


def make_app(page: gr.Blocks, host: str) -> FastAPI:
    """The page as an ASGI app; Gradio's run history, uploads and proxying are off."""
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}  # the visitor's own
    colours = {"body_text_color_subdued": "*neutral_600", "body_text_color_subdued_dark": "*neutral_300"}
    colours["button_primary_background_fill"] = "*primary_600"
    theme = gr.themes.Default(primary_hue="indigo", **fonts).set(**colours)
    app = FastAPI(openapi_url=None)
    app.add_middleware(BaseHTTPMiddleware, dispatch=guard)
    if host in LOOPBACK:  # against DNS rebinding by other sites
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])
    options = {"footer_links": [], "run_history": False, "ssr_mode": False, "mcp_server": False, "max_file_size": "1kb"}
    return gr.mount_gradio_app(app, page, path="", theme=theme, css=CSS, show_error=True, **options)


async def guard(request: Request, call_next: Any) -> Response:
    if request.url.path.startswith(CLOSED):
        return Response("off", 404)
    response: Response = await call_next(request)
    response.headers.update({"content-security-policy": POLICY, "referrer-policy": "no-referrer"})
    return response


def serve(page: gr.Blocks, host: str, port: int, line: str, address: str | None = None) -> None:
    """Serves the page until interrupted; prints `line` and opens `address` in a browser once it can be opened."""

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            print(line, flush=True)
            if address:
                webbrowser.open(address)

    config = uvicorn.Config(make_app(page, host), host=host, port=port, log_level="warning", access_log=False)
    asyncio.run(Server(config).serve())
