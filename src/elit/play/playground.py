"""State of the page: its renderer, and the run of each visitor."""

import functools
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr

from elit.play.renderer import Cancelled, Picture, Renderer, Tick
from elit.play.request import Request
from elit.play.style import facts_html

T = TypeVar("T")
Options = dict[str, Any]
Handler = Callable[..., object]
HIDDEN: Options = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""Options of events that compute next to nothing."""
RUN: Options = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
"""Options of events that run the network: they share one queue."""
PROGRESS = gr.Progress()
"""Default of the argument through which Gradio passes its progress bar."""


class Playground:
    """One page: its renderer, and the runs of its visitors."""

    def __init__(self, renderer: Renderer):
        self.renderer, self.engine = renderer, renderer.engine
        self.folder = tempfile.mkdtemp(prefix="elit-play-")
        self.stops: dict[str | None, threading.Event] = {}

    def request(self, controls: Sequence[object]) -> Request:
        """The request that the controls stand for. Raises ValueError."""
        return self.renderer.start.updated_by_controls(controls)

    def run(
        self, visitor: gr.Request, work: Callable[[Tick], T], progress: gr.Progress | None = None, unit: str = "step"
    ) -> T:
        """The result of `work`, whose tick shows progress and raises `Cancelled` when the visitor cancels."""
        stop = self.stops[visitor.session_hash] = threading.Event()

        def tick(done: int, total: int) -> None:
            if stop.is_set():
                raise Cancelled
            if progress is not None:
                progress((done, total), desc=unit)

        try:
            return work(tick)
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


def report_errors(where: gr.HTML) -> Callable[[Handler], Handler]:
    """Decorates a handler: a ValueError is shown in one of its outputs, and the others stay."""

    def decorate(handler: Handler) -> Handler:
        @functools.wraps(handler)
        def reporting(*inputs: object) -> object:
            try:
                return handler(*inputs)
            except Cancelled:
                return {where: gr.skip()}
            except ValueError as error:
                return {where: facts_html(" ".join(str(error).split()), "wrong")}

        return reporting

    return decorate
