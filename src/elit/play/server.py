"""The page behind a web server of its own: loopback by default, nothing from another host."""

import asyncio
import socket
import threading
import webbrowser
from pathlib import Path

import gradio as gr
import uvicorn
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from elit.elastic.engine import load_engine
from elit.play import LOOPBACK
from elit.play.page import build_page
from elit.play.renderer import Renderer
from elit.play.style import CSS, theme
from elit.pretrained import DEFAULT, model_folder, model_name

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; frame-ancestors 'self'; form-action 'self'; base-uri 'self'"
)
"""Browsers contact no other host, whatever the page contains."""
HEADERS = ((b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer"))
CLOSED = ("/gradio_api/upload", "/gradio_api/proxy", "/gradio_api/component_server")
"""Routes of Gradio that the page does not use."""


class Guard:
    """ASGI middleware that adds the policy to every answer and closes unused routes."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        if scope["type"] == "http" and scope["path"].startswith(CLOSED):
            await send({"type": "http.response.start", "status": 404, "headers": []})
            await send({"type": "http.response.body", "body": b"off"})
        else:
            await self.app(scope, receive, send_guarded)


def make_app(page: gr.Blocks, host: str) -> FastAPI:
    """The page as an ASGI app; Gradio's run history, uploads and proxying are off."""
    app = FastAPI(openapi_url=None)
    app.add_middleware(Guard)
    if host in LOOPBACK:  # against DNS rebinding by other sites
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])
    options = {"footer_links": [], "run_history": False, "ssr_mode": False, "mcp_server": False, "max_file_size": "1kb"}
    return gr.mount_gradio_app(app, page, path="", theme=theme(), css=CSS, show_error=True, **options)


def open_page(
    model: Path | None, service: str | None, key: str | None, *, vae: Path | None, device: str, dtype: str
) -> gr.Blocks:
    """The page of a model, by default the box's first, or of a service. Raises ValueError where loading fails."""
    monitor = None
    if service is not None:
        from elit.play.service import LoadMonitor, ServiceClient

        monitor = LoadMonitor(ServiceClient(service, key))
        monitor.client.describe()
    if monitor is not None and model is None:
        from elit.play.service_engine import ServiceEngine

        renderer = Renderer(ServiceEngine(monitor.client))
    else:
        folder = model_folder(model or DEFAULT)
        engine = load_engine(folder, name=model_name(folder), vae=vae, device=device, dtype=dtype)
        renderer = Renderer(engine, dtype)
        threading.Thread(target=renderer.thumbnails, daemon=True).start()
    return build_page(renderer, monitor)


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
