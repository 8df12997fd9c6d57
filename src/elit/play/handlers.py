"""What the handlers of all tabs share: the engine, the runs of each visitor, errors as messages."""

import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr

from elit.play.dial import Dial
from elit.play.engine import Cancelled, PageEngine, Picture, Tick
from elit.play.opening import Opening
from elit.sampling.settings import SampleSettings

HIDDEN: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""Of events that compute next to nothing."""
RUN: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
"""Of events that run the network: they share a queue, one at a time."""


STOPPED = "Stopped"
"""Title of the error that says that the visitor has cancelled."""
PROGRESS = gr.Progress()
"""The default of a handler's argument, by which Gradio knows to hand it its progress."""


class Runs:
    """The run that each visitor waits for, so that it can be stopped."""

    def __init__(self) -> None:
        self._stops: dict[str, threading.Event] = {}

    def begin(self, visitor: str | None) -> threading.Event:
        event = self._stops[visitor or ""] = threading.Event()
        return event

    def end(self, visitor: str | None) -> None:
        self._stops.pop(visitor or "", None)

    def stop(self, visitor: str | None) -> bool:
        """Whether something ran."""
        event = self._stops.get(visitor or "")
        if event is not None:
            event.set()
        return event is not None


@dataclass
class Playground:
    """One page's engine and visitors."""

    opening: Opening
    runs: Runs = field(default_factory=Runs)
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="elit-play-")))
    """Where the files lie that the page downloads; their names are made here."""

    @property
    def engine(self) -> PageEngine:
        return self.opening.engine

    def dial(self, values: Sequence[Any]) -> Dial:
        """Raises gr.Error, in one line, for controls that stand where they cannot."""
        return with_page_errors(lambda: Dial.from_controls(values))

    def settings(self, dial: Dial) -> SampleSettings:
        return self.opening.settings_of(dial)

    def draw(self, dial: Dial, tick: Tick, visitor: str | None) -> Picture:
        """One picture. Raises gr.Error for settings that do not fit, and when the visitor cancels."""

        def picture(stop: threading.Event) -> Picture:
            settings = self.settings(dial)
            return self.opening.picture(settings) or self.engine.generate(settings, tick, stop)

        return self.run(visitor, picture)

    def run(self, visitor: str | None, work: Callable[[threading.Event], Any]) -> Any:
        """`work`, handed an event that is set when the visitor cancels or leaves."""
        stop = self.runs.begin(visitor)
        try:
            return with_page_errors(lambda: work(stop))
        finally:
            self.runs.end(visitor)

    def left(self, request: gr.Request) -> None:
        """A visitor closed the page: nobody waits for the run."""
        self.runs.stop(request.session_hash)

    def save(self, picture: Picture) -> str:
        """The picture as a file to show and to download."""
        settings = picture.settings
        of = (settings.labels or settings.prompts)[0]
        name = "".join(each if each.isascii() and each.isalnum() else "-" for each in of)[:40]
        path = Path(tempfile.mkdtemp(dir=self.folder)) / f"elit-{name or 'picture'}-{settings.seed}{picture.suffix}"
        path.write_bytes(picture.file)
        return str(path)


def with_page_errors(work: Callable[[], Any]) -> Any:
    """What `work` gives; its ValueError as a message on the page, without a traceback."""
    try:
        return work()
    except Cancelled:
        raise gr.Error("The run was cancelled.", title=STOPPED, duration=4, print_exception=False) from None
    except ValueError as error:
        raise gr.Error(" ".join(str(error).split()), title="That does not work", print_exception=False) from None


def ticker(progress: gr.Progress, what: str) -> Tick:
    def show(done: int, total: int) -> None:
        progress((done, total), desc=what)

    return show
