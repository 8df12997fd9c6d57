"""Shared parts of the tabs: the runs of visitors, errors as lines of the page, texts, and the controls."""

import functools
import re
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr

from elit.play.renderer import MAX_SCALE, MAX_STEPS, Cancelled, Picture, Renderer, Tick, examples
from elit.sampling.settings import Sampling

T = TypeVar("T")
Handler = Callable[..., object]
# Options of events that compute next to nothing, and of those that run the network, which share one queue.
HIDDEN: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
RUN: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
PROGRESS = gr.Progress()  # Default of the argument through which Gradio passes its progress bar.
SHOWN: dict[str, Any] = {"interactive": False, "buttons": [], "format": "png"}  # Options of pictures.


class Playground:
    """One page: its renderer, and the runs of its visitors."""

    def __init__(self, renderer: Renderer):
        self.renderer, self.engine = renderer, renderer.engine
        self.folder = tempfile.mkdtemp(prefix="elit-play-")
        self.request = renderer.start.updated_by_controls
        self.stops: dict[str | None, threading.Event] = {}

    def run(self, visitor: gr.Request, work: Callable[[Tick], T], progress: gr.Progress, unit: str = "step") -> T:
        """The result of `work`, whose tick shows progress and raises `Cancelled` when the visitor cancels."""
        stop = self.stops[visitor.session_hash] = threading.Event()

        def tick(done: int, total: int) -> None:
            if stop.is_set():
                raise Cancelled
            progress((done, total), desc=unit)

        try:
            return work(tick)
        finally:
            self.stops.pop(visitor.session_hash, None)

    def cancel(self, visitor: gr.Request) -> None:
        if stop := self.stops.get(visitor.session_hash):
            stop.set()

    def save(self, picture: Picture) -> str:
        name = re.sub("[^a-zA-Z0-9]", "-", picture.request.condition)[:40] + f"-{picture.request.sampling.seed}"
        path = Path(tempfile.mkdtemp(dir=self.folder)) / f"elit-{name}{picture.suffix}"
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


def facts_html(text: str, kind: str = "") -> str:
    """A line of text; kind: "quiet" or "wrong"."""
    return f'<div class="facts" aria-live="polite"><span class="{kind}">{escape(text)}</span></div>'


@dataclass
class Controls:
    """The components; `values` are those of a request, in the order of `CONTROLS`."""

    values: list[Any]
    cost: gr.HTML
    schedule: gr.LinePlot
    run: gr.Button
    cancel: gr.Button
    dice: gr.Button
    thumbnails: gr.Gallery | None
    examples: list[tuple[gr.Button, Sampling]]


def build_controls(play: Playground) -> Controls:
    """The controls, the same for all tabs."""
    engine, start = play.engine, play.renderer.start
    budgets, given = engine.budgets, start.values()
    low, high = (budgets[0], budgets[-1]) if budgets else (1, 1)
    latents: dict[str, Any] = {"minimum": low, "maximum": high, "step": low, "visible": bool(budgets)}
    if engine.takes_text:
        condition = gr.Textbox(start.condition, label="Prompt", info="Enter draws", max_lines=2, elem_id="prompt")
    else:
        condition = gr.Dropdown(list(engine.classes), value=start.condition, label="Class", allow_custom_value=True)
    thumbnails = None
    if play.renderer.shows_classes:
        looks = SHOWN | {"columns": 5, "height": "auto", "allow_preview": False, "object_fit": "contain"}
        thumbnails = gr.Gallery(label="Classes", elem_classes="thumbnails", elem_id="thumbnails", **looks)
    budget = gr.Slider(label="Budget: latents per window", value=high, elem_id="budget", **latents)
    cost = gr.HTML(elem_id="cost")
    with gr.Row():
        run = gr.Button("Draw", variant="primary", elem_id="draw")
        cancel = gr.Button("Cancel", elem_id="cancel")
    with gr.Row():
        seed = gr.Number(start.sampling.seed, precision=0, label="Seed", elem_id="seed")
        dice = gr.Button("Random seed", elem_id="dice")
    with gr.Row(elem_classes="examples", elem_id="examples"):
        named = examples(start.sampling, budgets, engine.guidance_kinds)
        buttons = [(gr.Button(name, size="sm", min_width=60), sampling) for name, sampling in named]
    with gr.Accordion("Steps and guidance", open=False):
        steps = gr.Slider(1, MAX_STEPS, value=start.sampling.steps, step=1, label="Steps", elem_id="steps")
        kinds = [(kind if kind == "none" else kind.upper(), kind) for kind in engine.guidance_kinds]
        info = "The second branch drops the class (CFG), latents (AG), or both (CCFG)"
        guidance = gr.Radio(kinds, value=given["guidance"], label="Guidance", elem_id="guidance", info=info)
        scale = gr.Slider(0, MAX_SCALE, value=given["scale"], step=0.05, label="Scale; 1 is off", elem_id="scale")
        weak = gr.Slider(label="Latents of the second branch", value=low, **latents)
    with gr.Accordion("Budget over time", open=False, visible=bool(budgets)):
        axes: dict[str, Any] = {"x": "t", "y": "latents", "x_lim": [0, 1], "y_lim": [0, 1.1 * high], "height": 200}
        axes |= {"title": "Latents per window in every step", "x_title": "t: 0 is noise, 1 is data"}
        schedule = gr.LinePlot(elem_id="schedule", **axes)
        info = "Latents or shares between two t: 4@0-0.5,16@0.5-1, or 25%@0-0.5,100%@0.5-1. Enter draws"
        pieces = gr.Textbox(label="Schedule in place of the budget", info=info, elem_id="pieces")
    values = [condition, seed, budget, pieces, steps, guidance, scale, weak]
    return Controls(values, cost, schedule, run, cancel, dice, thumbnails, buttons)
