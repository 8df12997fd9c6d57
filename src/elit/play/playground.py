"""State behind the page's handlers: the renderer, each visitor's run, errors as messages."""

import functools
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from elit.play.renderer import Cancelled, Picture, Renderer, Tick
from elit.play.request import Request
from elit.play.style import error_html

HIDDEN: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""Options of events that compute next to nothing."""
RUN: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
"""Options of events that run the network: they share one queue."""
PROGRESS = gr.Progress()
"""Default of the argument through which Gradio passes its progress bar."""


class Playground:
    """One page: its renderer, and the runs of its visitors."""

    def __init__(self, renderer: Renderer):
        self.renderer, self.engine = renderer, renderer.engine
        self.folder = tempfile.mkdtemp(prefix="elit-play-")
        self.stops: dict[str | None, threading.Event] = {}

    def request(self, controls: Sequence[Any]) -> Request:
        """The request that the controls stand for. Raises ValueError."""
        return self.renderer.start.updated_by_controls(controls)

    def draw(self, request: Request, tick: Tick | None, visitor: gr.Request) -> Picture:
        """One picture. Raises ValueError, and `Cancelled` when the visitor cancels."""
        return self.run(visitor, lambda stop: self.renderer.draw(request, tick, stop))

    def run(self, visitor: gr.Request, work: Callable[[threading.Event], Any]) -> Any:
        """The result of `work`, called with an event that is set when the visitor cancels or leaves."""
        stop = self.stops[visitor.session_hash] = threading.Event()
        try:
            return work(stop)
        finally:
            self.stops.pop(visitor.session_hash, None)

    def cancel(self, visitor: gr.Request) -> None:
        """Stops the visitor's run, if there is one."""
        if stop := self.stops.get(visitor.session_hash):
            stop.set()

    def save(self, picture: Picture) -> str:
        """Path of the picture as a file to show and to download."""
        request = picture.request
        name = "".join(each if each.isascii() and each.isalnum() else "-" for each in request.condition)[:40]
        path = Path(tempfile.mkdtemp(dir=self.folder)) / f"elit-{name}-{request.sampling.seed}{picture.suffix}"
        path.write_bytes(picture.file)
        return str(path)


def report_errors(where: gr.HTML) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a handler: a ValueError is shown in one of its outputs, and the others stay."""

    def decorate(handler: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(handler)
        def reporting(*inputs: Any) -> Any:
            try:
                return handler(*inputs)
            except Cancelled:
                return {where: gr.skip()}
            except ValueError as error:
                return {where: error_html(" ".join(str(error).split()))}

        return reporting

    return decorate


def ticker(progress: gr.Progress, unit: str) -> Tick:
    """Reports the steps of a run to a progress bar."""
    return lambda done, total: progress((done, total), desc=unit)
