"""What a page opens with, made while its web server starts."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from PIL import Image

from elit.play.dial import Dial, default_dial
from elit.play.engine import PageEngine, Picture
from elit.sampling.settings import SampleSettings

MOST_THUMBNAILS = 32
"""Up to so many classes have a picture to choose them by."""
THUMBNAIL_STEPS, THUMBNAIL_BUDGET = 8, "25%"


class Opening:
    """The first picture and those of the classes, made in a thread of its own from now on; by a service, on demand."""

    def __init__(self, engine: PageEngine):
        self.engine = engine
        self.dial = default_dial(engine.start, engine.budgets)
        self.settings = self.settings_of(self.dial)
        self._thumbnails: Future[list[Image.Image]] = Future()
        self._picture: Future[Picture] = Future()
        if engine.has_thumbnails:
            threading.Thread(target=self._make, daemon=True).start()

    @property
    def shows_classes(self) -> bool:
        return self.engine.has_thumbnails and 0 < len(self.engine.classes) <= MOST_THUMBNAILS

    def settings_of(self, dial: Dial) -> SampleSettings:
        """Raises ValueError."""
        return dial.settings(takes_text=self.engine.takes_text, dtype=self.engine.dtype)

    def thumbnails(self) -> list[tuple[Image.Image, str]]:
        """A picture of every class with its name."""
        return list(zip(self._thumbnails.result(), self.engine.classes, strict=True))

    def picture(self, settings: SampleSettings) -> Picture | None:
        """The first picture, where these are its settings. Raises what making it raised."""
        return self._picture.result() if self.engine.has_thumbnails and settings == self.settings else None

    def _make(self) -> None:
        def first_picture() -> Picture:
            self.engine.generate(replace(self.settings, steps=1))  # warms up, so that the next one's time is its own
            return self.engine.generate(self.settings)

        budget = THUMBNAIL_BUDGET if self.engine.budgets else "full"
        quick = replace(self.settings, steps=THUMBNAIL_STEPS, budget=budget)
        _settle(self._picture, first_picture)
        _settle(self._thumbnails, lambda: self.engine.thumbnails(quick) if self.shows_classes else [])


def _settle(future: Future[Any], work: Callable[[], Any]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # raised to whoever asks for the result
        future.set_exception(error)
