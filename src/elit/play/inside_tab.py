"""The tab that looks inside the picture's run: attention over the picture, latents left out, the way from noise."""

from typing import Any

import gradio as gr

from elit.play.charts import bar_chart
from elit.play.controls import Controls
from elit.play.engine import NetworkEngine, Picture
from elit.play.handlers import HIDDEN, PROGRESS, RUN, Playground, ticker, with_page_errors
from elit.play.inside import attention_maps, latents_that_matter, trajectory
from elit.play.pictures import overlay


def build_inside(play: Playground, engine: NetworkEngine, controls: Controls, present: gr.State) -> None:
    maps = gr.State(None)
    with gr.Row():
        look = gr.Button("Look inside this picture", variant="primary", elem_id="look")
        matter = gr.Button("Which latents matter", elem_id="matter")
    with gr.Row():
        image = gr.Image(
            label="What the latent reads, in orange", format="png", interactive=False, buttons=["fullscreen"],
            elem_classes="picture", elem_id="overlay", height=400,
        )  # fmt: skip
        with gr.Column():
            latent = gr.Slider(1, engine.budgets[-1], value=1, step=1, label="Latent", elem_id="latent")
            step = gr.Slider(1, 16, value=8, step=1, label="Step: from noise to picture", elem_id="step")
            words = gr.HTML(elem_id="looked")
    bars = gr.HTML(elem_id="bars")
    frames = gr.Gallery(
        label="From noise to picture", columns=5, height="auto", format="png", interactive=False, buttons=[],
        elem_classes="frames", elem_id="frames",
    )  # fmt: skip

    def overlaid(held: Any, latent: float, step: float) -> tuple[Any, str]:
        if held is None:
            return None, ""
        times, weights, base = held
        j, i = min(int(latent), weights.shape[1]) - 1, min(int(step), len(times)) - 1
        caption = f"Latent {j + 1} of {weights.shape[1]} at t = {times[i]:.2f}. Each window of the picture has "
        caption += "latents of its own. Orange is where this one reads most, mean over heads."
        return overlay(base, weights[i, j]), f'<div class="facts">{caption}</div>'

    def looked(picture: Picture | None) -> Any:
        current = require_picture(picture)
        with engine.lock:
            times, weights = with_page_errors(lambda: attention_maps(engine, current))
            states = trajectory(engine, current)
        held = (times, weights, current.image())
        middle = (len(times) + 1) // 2
        sliders = gr.Slider(maximum=weights.shape[1], value=1), gr.Slider(maximum=max(2, len(times)), value=middle)
        return held, *sliders, *overlaid(held, 1, middle), states

    def left_out(request: gr.Request, picture: Picture | None, progress: gr.Progress = PROGRESS) -> str:
        current = require_picture(picture)
        with engine.lock:
            shares = play.run(
                request.session_hash,
                lambda stop: latents_that_matter(engine, current, ticker(progress, "latent"), stop),
            )
        title = "How far the velocity moves when a latent is left out of every group"
        return bar_chart(shares, "share of the velocity", title) + f'<div class="facts quiet">{title}.</div>'

    outputs = [maps, latent, step, image, words, frames]
    events: list[Any] = [look.click(looked, present, outputs, **RUN), matter.click(left_out, present, bars, **RUN)]
    gr.on(
        [latent.input, step.input], overlaid, [maps, latent, step], [image, words], trigger_mode="always_last", **HIDDEN
    )
    controls.cancel.click(None, cancels=events, api_visibility="private")


def require_picture(picture: Picture | None) -> Picture:
    """The picture to look into. Raises gr.Error where none was drawn."""
    if picture is None:
        raise gr.Error("Draw a picture first.", title="Inside", print_exception=False)
    return picture
