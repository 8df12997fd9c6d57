"""The tab that compares: the same seed at two budgets, their difference, and a strip of all budgets."""

from dataclasses import replace
from typing import Any

import gradio as gr

from elit.play.controls import Controls
from elit.play.dial import MOST_PIECES, Dial
from elit.play.handlers import PROGRESS, RUN, Playground, ticker
from elit.play.pictures import difference, display_budgets, enlarge
from elit.play.words import table


def build_compare(play: Playground, controls: Controls) -> None:
    counts = play.engine.budgets
    low, high, by = counts[0], counts[-1], counts[0]
    quarter = max(low, high // 4 // by * by)
    with gr.Row():
        first = gr.Slider(low, high, value=quarter, step=by, label="Left: latents of every group", elem_id="left")
        second = gr.Slider(low, high, value=high, step=by, label="Right", elem_id="right")
    with gr.Row():
        compare = gr.Button("Compare the two", variant="primary", elem_id="compare")
        strip = gr.Button("Draw all budgets", elem_id="strip")
    with gr.Row():
        looks: dict[str, Any] = {"format": "png", "buttons": [], "elem_classes": "picture", "interactive": False}
        slider = gr.ImageSlider(label="Left and right", elem_id="slider", **looks)
        apart = gr.Image(label="Difference", elem_id="apart", **looks)
    facts = gr.HTML(elem_id="compared")
    every = gr.Gallery(
        label="All budgets, the same seed", columns=4, height="auto", format="png", interactive=False, buttons=[],
        elem_classes="frames", elem_id="every",
    )  # fmt: skip

    def at(dial: Dial, latents: float) -> Dial:
        return replace(dial, pieces=1, budgets=(int(latents),) * MOST_PIECES)

    def compared(request: gr.Request, left: int, right: int, progress: gr.Progress = PROGRESS, *given: Any) -> Any:
        dial = play.dial(given)
        pictures = [
            play.draw(at(dial, count), ticker(progress, "step"), request.session_hash) for count in (left, right)
        ]
        image, largest = difference(*(picture.pixels for picture in pictures))
        rows = [
            (name, f"{count} of {counts[-1]}", f"{picture.gflops:.4g}", f"{picture.ms:.0f}")
            for name, count, picture in zip(("left", "right"), (left, right), pictures, strict=True)
        ]
        words = table(("", "latents", "GFLOPs", "ms"), rows)
        words += f'<div class="facts quiet">Largest difference: {100 * largest:.0f}% of black to white.</div>'
        return tuple(enlarge(picture.image()) for picture in pictures), image, words

    def all_budgets(request: gr.Request, progress: gr.Progress = PROGRESS, *given: Any) -> Any:
        dial, frames = play.dial(given), []
        for number, count in enumerate(budgets := display_budgets(counts)):
            progress((number, len(budgets)), desc="budget")
            picture = play.draw(at(dial, count), lambda done, total: None, request.session_hash)
            words = f"{count} of {counts[-1]}: {picture.gflops:.3g} GFLOPs, {picture.ms:.0f} ms"
            frames.append((enlarge(picture.image(), 192), words))
        return frames

    inputs, outputs = [first, second, *controls.values], [slider, apart, facts]
    events: list[Any] = [
        compare.click(compared, inputs, outputs, show_progress_on=[facts], **RUN),
        strip.click(all_budgets, controls.values, every, **RUN),
    ]
    controls.cancel.click(None, cancels=events, api_visibility="private")
