"""The Inside tab: attention of Read over the picture, and the states of its run."""

import gradio as gr
from PIL import Image
from torch import Tensor

from elit.play.controls import NO_BUTTONS, Controls
from elit.play.pictures import attention_maps, overlay, trajectory
from elit.play.playground import HIDDEN, RUN, Playground, report_errors
from elit.play.renderer import Picture
from elit.play.style import facts_html
from elit.sampling.engine import NetworkEngine


def build_inside(play: Playground, engine: NetworkEngine, controls: Controls, tab: gr.Tab, present: gr.State) -> None:
    maps = gr.State(None)
    inspect = gr.Button("Inspect this picture", variant="primary", elem_id="look")
    with gr.Row():
        image = gr.Image(
            label="Attention of the latent, in orange", height=400, elem_classes="picture", elem_id="overlay",
            **NO_BUTTONS | {"buttons": ["fullscreen"]},
        )  # fmt: skip
        with gr.Column():
            latent = gr.Slider(1, engine.budgets[-1], value=1, step=1, label="Latent", elem_id="latent")
            step = gr.Slider(1, 16, value=8, step=1, label="Step: from noise to picture", elem_id="step")
            caption = gr.HTML(elem_id="looked")
    frames = gr.Gallery(
        label="From noise to picture", columns=5, height="auto", elem_classes="frames", elem_id="frames", **NO_BUTTONS
    )

    def show(
        held: tuple[list[float], Tensor, Image.Image] | None, latent: float, step: float
    ) -> tuple[Image.Image | None, str]:
        if held is None:
            return None, ""
        times, weights, base = held
        j, i = min(int(latent), weights.shape[1]) - 1, min(int(step), len(times)) - 1
        text = f"Latent {j + 1} of {weights.shape[1]} at t = {times[i]:.2f}. Each window of the picture has its own "
        text += "latents. Orange marks the tokens with the most attention, mean over heads."
        return overlay(base, weights[i, j]), facts_html(text)

    @report_errors(caption)
    def inspect_picture(picture: Picture | None) -> object:
        if picture is None:
            raise ValueError("cannot inspect: draw a picture first")

        with play.renderer.lock:
            (times, weights), states = attention_maps(engine, picture), trajectory(engine, picture)
        held, middle = (times, weights, picture.image()), (len(times) + 1) // 2
        sliders = gr.Slider(maximum=weights.shape[1], value=1), gr.Slider(maximum=max(2, len(times)), value=middle)
        return held, *sliders, *show(held, 1, middle), states

    starts = [tab.select, inspect.click]
    event = gr.on(starts, inspect_picture, present, [maps, latent, step, image, caption, frames], **RUN)
    moved = [latent.input, step.input]
    gr.on(moved, show, [maps, latent, step], [image, caption], trigger_mode="always_last", **HIDDEN)
    controls.cancel.click(None, cancels=[event], api_visibility="private")
