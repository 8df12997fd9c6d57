"""The page behind a web server of its own: loopback unless asked otherwise, nothing of another host."""

import os
from collections.abc import Callable
from typing import Any

LOOPBACK = ("127.0.0.1", "localhost", "::1")
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
    "worker-src 'self' blob:; frame-ancestors 'self'; form-action 'self'; base-uri 'self'"
)
"""A browser asks no other host, whatever a part of the page wants."""


class Guard:
    """ASGI middleware: the policy on every answer, and what the page does not use is not there."""

    closed = ("/gradio_api/upload", "/gradio_api/proxy", "/gradio_api/component_server")

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                extra = {b"content-security-policy": POLICY.encode(), b"referrer-policy": b"no-referrer"}
                message["headers"] = [*message.get("headers", []), *extra.items()]
            await send(message)

        if scope["type"] == "http" and scope["path"].startswith(self.closed):
            await send({"type": "http.response.start", "status": 404, "headers": []})
            await send({"type": "http.response.body", "body": b"off"})
        else:
            await self.app(scope, receive, send_guarded)


def make_app(page: Any, host: str) -> Any:
    """The page as an ASGI app; Gradio's run history, uploads and proxying are off."""
    import gradio as gr
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from elit.play.style import CSS, theme

    app = FastAPI(openapi_url=None)
    app.add_middleware(Guard)
    if host in LOOPBACK:  # a page of another site cannot reach this one by a name that it points here
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])
    options = {"footer_links": [], "run_history": False, "ssr_mode": False, "mcp_server": False, "max_file_size": "1kb"}
    return gr.mount_gradio_app(app, page, path="", theme=theme(), css=CSS, show_error=True, **options)


def quiet_gradio() -> None:
    """Before Gradio is imported: no analytics, no question for newer versions."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def serve(page: Any, host: str, port: int, ready: Callable[[], None]) -> None:
    """Serves the page until it is interrupted; `ready` is called once it can be opened."""
    import asyncio

    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            ready()

    config = uvicorn.Config(make_app(page, host), host=host, port=port, log_level="warning", access_log=False)
    asyncio.run(Server(config).serve())
