"""The Compare tab: the same seed at two budgets, their difference, and a strip of all budgets."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import gradio as gr

from elit.budgets import evenly_spaced
from elit.play.controls import NO_BUTTONS, Controls
from elit.play.pictures import difference, enlarge
from elit.play.playground import PROGRESS, RUN, Options, Playground, report_errors
from elit.play.renderer import Picture
from elit.play.style import describe_picture, facts_html
from elit.sampling.engine import NetworkEngine

MAX_PICTURES = 16


def build_compare(play: Playground, controls: Controls, tab: gr.Tab) -> None:
    budgets = play.engine.budgets
    low, high = budgets[0], budgets[-1]
    latents: Options = {"minimum": low, "maximum": high, "step": low}
    with gr.Row():
        quarter = max(low, high // 4 // low * low)
        first = gr.Slider(label="Left: latents of every group", value=quarter, elem_id="left", **latents)
        second = gr.Slider(label="Right: latents of every group", value=high, elem_id="right", **latents)
    with gr.Row():
        compare = gr.Button("Compare the two", variant="primary", elem_id="compare")
        strip = gr.Button("Draw all budgets", elem_id="strip")
    with gr.Row():
        slider = gr.ImageSlider(label="Left and right", elem_id="slider", elem_classes="picture", **NO_BUTTONS)
        apart = gr.Image(label="Difference", elem_id="apart", elem_classes="picture", **NO_BUTTONS)
    facts = gr.HTML(elem_id="compared")
    gallery = gr.Gallery(
        label="All budgets, the same seed", columns=4, height="auto", elem_classes="frames", elem_id="every",
        **NO_BUTTONS,
    )  # fmt: skip

    def draw_at(
        latents: Sequence[float], visitor: gr.Request, progress: gr.Progress, given: Sequence[object]
    ) -> list[Picture]:
        request = play.request(given)
        wanted = [replace(request, sampling=replace(request.sampling, budget=int(each))) for each in latents]
        return play.run(visitor, lambda tick: [play.renderer.draw(each, tick) for each in wanted], progress)

    @report_errors(facts)
    def compare_two(
        visitor: gr.Request, left: int, right: int, progress: gr.Progress = PROGRESS, *given: object
    ) -> object:
        pictures = draw_at((left, right), visitor, progress, given)
        image, largest = difference(*(picture.image() for picture in pictures))
        scale = facts_html(f"White in the difference is {largest:.0%} of the range from black to white.", "quiet")
        text = "".join(describe_picture(picture) for picture in pictures) + scale
        return tuple(enlarge(picture.image()) for picture in pictures), image, text

    @report_errors(facts)
    def draw_all(visitor: gr.Request, progress: gr.Progress = PROGRESS, *given: object) -> object:
        frames = []
        for picture in draw_at(evenly_spaced(budgets, MAX_PICTURES), visitor, progress, given):
            latents = f"{picture.request.sampling.budget} of {high}"
            frames.append(
                (enlarge(picture.image(), 192), f"{latents}: {picture.gflops:.3g} GFLOPs, {picture.ms:.0f} ms")
            )
        return {gallery: frames}

    inputs, outputs = [first, second, *controls.values], [slider, apart, facts]
    starts = [tab.select, compare.click] if isinstance(play.engine, NetworkEngine) else [compare.click]
    events: list[Any] = [
        gr.on(starts, compare_two, inputs, outputs, show_progress_on=[facts], **RUN),
        strip.click(draw_all, controls.values, [gallery, facts], **RUN),
    ]
    controls.cancel.click(None, cancels=events, api_visibility="private")
