"""The page: controls on one side, what they make on the other, a tab for each way to look at it."""

import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr

from elit.play.charts import schedule_chart
from elit.play.dial import CONTROLS, GUIDANCES, Dial, default_dial
from elit.play.engine import Cancelled, NetworkEngine, Picture, Tick
from elit.play.style import quiet, wrong
from elit.play.words import cost_words, picture_words
from elit.sampling.settings import SampleSettings

MODEL = "model"
"""Runs of the network share this queue, one at a time."""
THUMBNAILS = 32
"""Up to so many classes have a picture to choose them by."""
REMEMBER = "(link) => { if (link) history.replaceState(null, '', '?' + link); }"
HIDDEN: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
RUN: dict[str, Any] = {"concurrency_id": MODEL, "concurrency_limit": 1, "api_visibility": "private"}


class Runs:
    """The run that each visitor has asked for, so that it can be stopped."""

    def __init__(self) -> None:
        self._stops: dict[str, threading.Event] = {}

    def begin(self, visitor: str | None) -> threading.Event:
        return self._stops.setdefault(visitor or "", threading.Event())

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
    """What the handlers of all tabs share."""

    engine: NetworkEngine
    folder: Path
    """Where the files lie that the page downloads; their names are made here."""
    runs: Runs

    def dial(self, values: Any) -> Dial:
        """Raises gr.Error, in one line, for controls that stand where they cannot."""
        return told(lambda: Dial.from_controls(values))

    def settings(self, dial: Dial) -> SampleSettings:
        return dial.settings(takes_text=self.engine.takes_text, dtype=self.engine.dtype)

    def run(self, dial: Dial, tick: Tick, visitor: str | None) -> Picture:
        """One picture, as `told` and `stoppable`."""
        return self.stoppable(visitor, lambda stop: self.engine.generate(self.settings(dial), tick, stop))

    def stoppable(self, visitor: str | None, work: Callable[[threading.Event], Any]) -> Any:
        stop = self.runs.begin(visitor)
        try:
            return told(lambda: work(stop))
        finally:
            self.runs.end(visitor)

    def left(self, request: gr.Request) -> None:
        """The visitor closed the page: nobody waits for the run."""
        self.runs.stop(request.session_hash)

    def save(self, picture: Picture) -> str:
        """The picture as a file to show and to download."""
        settings = picture.settings
        name = "".join(each if each.isalnum() else "-" for each in (settings.labels or settings.prompts)[0])[:40]
        place = Path(tempfile.mkdtemp(dir=self.folder))
        path = place / f"elit-{name or 'picture'}-{settings.seed}{picture.suffix}"
        path.write_bytes(picture.file)
        return str(path)


def told(work: Callable[[], Any]) -> Any:
    """What `work` gives; its ValueError as a message on the page, without a traceback."""
    try:
        return work()
    except Cancelled:
        raise gr.Error("Cancelled.", title="Stopped", duration=4, print_exception=False) from None
    except ValueError as error:
        raise gr.Error(" ".join(str(error).split()), title="That does not work", print_exception=False) from None


def ticker(progress: gr.Progress, what: str) -> Tick:
    return lambda done, total: progress((done, total), desc=what)


@dataclass
class Controls:
    """The components on the left, in the order of `CONTROLS` and beside them."""

    values: list[Any]
    cost: gr.HTML
    schedule: gr.HTML
    run: gr.Button
    cancel: gr.Button
    dice: gr.Button
    thumbnails: gr.Gallery | None


def build_page(engine: NetworkEngine) -> gr.Blocks:
    """The page of an engine, not yet served."""
    folder = Path(tempfile.mkdtemp(prefix="elit-play-"))
    play = Playground(engine, folder, Runs())
    start = default_dial(engine.classes, engine.budgets)
    with gr.Blocks(title="elit playground", analytics_enabled=False, delete_cache=(1800, 3600)) as page:
        gr.HTML(
            f'<div class="head"><h1>elit playground</h1><p>Every picture is from the same weights, {engine.name}. The '
            "budget says how many latents the middle of the network works on: fewer cost less.</p></div>"
        )
        present = gr.State(None)
        with gr.Row(elem_classes="sides"):
            with gr.Column(scale=5, min_width=320):
                controls = build_controls(play, start)
            with gr.Column(scale=7, min_width=320), gr.Tabs(), gr.Tab("Dial", id="dial"):
                build_dial(page, play, controls, start, present)
        page.queue(default_concurrency_limit=4, max_size=64)
        page.unload(play.left)
    return page


def build_controls(play: Playground, start: Dial) -> Controls:
    engine, counts = play.engine, play.engine.budgets
    condition: Any
    if engine.takes_text:
        condition = gr.Textbox(start.condition, label="Prompt", info="Enter draws", max_lines=2)
    else:
        condition = gr.Dropdown(list(engine.classes), value=start.condition, label="Class", allow_custom_value=True)
    thumbnails = None
    if 0 < len(engine.classes) <= THUMBNAILS:
        thumbnails = gr.Gallery(
            label="Classes", columns=5, height="auto", allow_preview=False, interactive=False, buttons=[],
            elem_classes="thumbnails", elem_id="thumbnails",
        )  # fmt: skip
    has = bool(counts)
    low, high, by = (counts[0], counts[-1], counts[0]) if counts else (1, 1, 1)
    budget = gr.Slider(
        low, high, value=high, step=by, label="Budget: latents of every group", visible=has, elem_id="budget"
    )
    cost = gr.HTML(elem_id="cost")
    with gr.Row():
        run = gr.Button("Draw", variant="primary", elem_id="draw")
        cancel = gr.Button("Cancel", elem_id="cancel")
    with gr.Row():
        seed = gr.Number(start.seed, precision=0, minimum=0, label="Seed", elem_id="seed")
        dice = gr.Button("Roll the dice", elem_id="dice")
    with gr.Accordion("Steps and guidance", open=False):
        steps = gr.Slider(1, 64, value=start.steps, step=1, label="Steps", elem_id="steps")
        kinds = [(kind if kind == "none" else kind.upper(), kind) for kind in (GUIDANCES if has else GUIDANCES[:2])]
        words = "The second branch drops the class (CFG), latents (AG), or both (CCFG)"
        guidance = gr.Radio(kinds, value=start.guidance, label="Guidance", elem_id="guidance", info=words)
        scale = gr.Slider(0, 8, value=start.scale, step=0.05, label="Guidance scale; 1 is off", elem_id="scale")
        weak = gr.Slider(low, high, value=low, step=by, label="Latents of the second branch", visible=has)
    with gr.Accordion("Budget over time", open=False, visible=has):
        schedule = gr.HTML(elem_id="schedule")
        pieces = gr.Radio([1, 2, 3], value=1, label="Pieces", info="How often the budget changes while t rises")
        with gr.Row():
            knot = gr.Slider(0.05, 0.95, value=0.33, step=0.01, label="Second piece from t =", elem_id="knot")
            second = gr.Slider(low, high, value=high, step=by, label="with latents", elem_id="second")
        with gr.Row():
            later = gr.Slider(0.05, 0.95, value=0.67, step=0.01, label="Third piece from t =")
            third = gr.Slider(low, high, value=high, step=by, label="with latents")
    values = [condition, seed, budget, pieces, knot, later, second, third, steps, guidance, scale, weak]
    assert len(values) == len(CONTROLS)
    return Controls(values, cost, schedule, run, cancel, dice, thumbnails)


def build_dial(page: gr.Blocks, play: Playground, controls: Controls, start: Dial, present: gr.State) -> None:
    """The picture, and all that draws it."""
    engine, values = play.engine, controls.values
    image = gr.Image(
        type="filepath", show_label=False, interactive=False, buttons=["fullscreen"], elem_classes="picture",
        elem_id="picture", height=420,
    )  # fmt: skip
    facts = gr.HTML(elem_id="facts")
    with gr.Row():
        download = gr.DownloadButton("Download, settings inside", interactive=False, elem_id="download")
    link = gr.Textbox(visible="hidden", elem_id="link")

    def draw(*given: Any, request: gr.Request, progress: gr.Progress = gr.Progress()) -> Any:  # noqa: B008
        dial = play.dial(given)
        picture = play.run(dial, ticker(progress, "step"), request.session_hash)
        path = play.save(picture)
        file = gr.DownloadButton(value=path, interactive=True)
        return path, picture_words(picture), file, picture, dial.query()

    def price(*given: Any) -> tuple[str, str]:
        try:
            dial = Dial.from_controls(given)
            cost = engine.cost(play.settings(dial))
        except ValueError as error:
            return wrong(str(error)), quiet("")
        most = engine.budgets[-1] if engine.budgets else 0
        latents = f"budget {dial.budget} of {most} latents" if most else "no latents: a baseline"
        return cost_words(cost, latents), schedule_chart(dial.spans(), most) if most else ""

    def opened(request: gr.Request) -> list[Any]:
        try:
            return start.from_query(dict(request.query_params), engine.budgets).controls()
        except ValueError as error:
            gr.Warning(f"This link does not fit the model: {error}", title="Link")
            return start.controls()

    def roll() -> int:
        import random

        return random.randrange(2**31)

    outputs = [image, facts, download, present, link]
    drawing: dict[str, Any] = {
        "inputs": values,
        "outputs": outputs,
        "show_progress_on": [facts],
        "trigger_mode": "always_last",
    } | RUN
    condition, seed, budget = values[:3]
    submits = [condition.submit] if engine.takes_text else [condition.input]
    rolled = controls.dice.click(roll, outputs=seed, **HIDDEN)
    events = [
        gr.on([controls.run.click, budget.input, seed.submit, *submits], draw, **drawing),
        rolled.then(draw, **drawing),
    ]
    if controls.thumbnails is not None:

        def choose(event: gr.SelectData) -> str:
            return engine.classes[event.index]

        chosen = controls.thumbnails.select(choose, outputs=condition, **HIDDEN)
        events.append(chosen.then(draw, **drawing))
    first = page.load(opened, outputs=values, **HIDDEN)
    events.append(first.then(draw, **drawing))
    if controls.thumbnails is not None:
        pictures = ThumbnailMaker(engine, play.settings(replace(start, steps=8)))
        page.load(pictures, outputs=controls.thumbnails, show_progress="hidden", api_visibility="private")
    turned = [page.load, *(each.change for each in values), present.change]
    gr.on(turned, price, values, [controls.cost, controls.schedule], trigger_mode="always_last", **HIDDEN)
    link.change(None, inputs=link, js=REMEMBER, api_visibility="private")

    def cancel(request: gr.Request) -> None:
        if not play.runs.stop(request.session_hash):
            gr.Info("Nothing is running.", duration=3)

    controls.cancel.click(cancel, cancels=events, **HIDDEN)


class ThumbnailMaker:
    """Pictures of all classes, made once."""

    def __init__(self, engine: NetworkEngine, settings: SampleSettings):
        self.engine, self.settings = engine, settings
        self._pictures: list[Any] | None = None
        self._lock = threading.Lock()

    def __call__(self) -> list[Any]:
        with self._lock:
            if self._pictures is None:
                self._pictures = list(zip(self.engine.thumbnails(self.settings), self.engine.classes, strict=True))
        return self._pictures
