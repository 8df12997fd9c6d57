"""The controls of the page, the same for all tabs."""

from dataclasses import dataclass
from typing import Any

import gradio as gr

from elit.play.playground import Options, Playground
from elit.play.request import CONTROLS, MAX_SCALE, MAX_STEPS, examples
from elit.sampling.settings import Sampling

NO_BUTTONS: Options = {"interactive": False, "buttons": [], "format": "png"}


@dataclass
class Controls:
    """The components; `values` are those of a request, in the order of `CONTROLS`."""

    values: list[Any]
    cost: gr.HTML
    schedule: gr.HTML
    run: gr.Button
    cancel: gr.Button
    dice: gr.Button
    thumbnails: gr.Gallery | None
    examples: list[tuple[gr.Button, Sampling]]


def build_controls(play: Playground) -> Controls:
    engine, start = play.engine, play.renderer.start
    budgets, values = engine.budgets, start.values()
    low, high = (budgets[0], budgets[-1]) if budgets else (1, 1)
    latents: Options = {"minimum": low, "maximum": high, "step": low, "value": high}
    condition: Any
    if engine.takes_text:
        condition = gr.Textbox(start.condition, label="Prompt", info="Enter draws", max_lines=2, elem_id="prompt")
    else:
        condition = gr.Dropdown(list(engine.classes), value=start.condition, label="Class", allow_custom_value=True)
    thumbnails = None
    if play.renderer.shows_classes:
        thumbnails = gr.Gallery(
            label="Classes", columns=5, height="auto", allow_preview=False, object_fit="contain",
            elem_classes="thumbnails", elem_id="thumbnails", **NO_BUTTONS,
        )  # fmt: skip
    budget = gr.Slider(label="Budget: latents of every group", visible=bool(budgets), elem_id="budget", **latents)
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
        guidance = gr.Radio(kinds, value=values["guidance"], label="Guidance", elem_id="guidance", info=info)
        scale = gr.Slider(0, MAX_SCALE, value=values["scale"], step=0.05, label="Scale; 1 is off", elem_id="scale")
        weak = gr.Slider(label="Latents of the second branch", visible=bool(budgets), **latents | {"value": low})
    with gr.Accordion("Budget over time", open=False, visible=bool(budgets)):
        schedule = gr.HTML(elem_id="schedule")
        info = "Latents or shares between two t: 4@0-0.5,16@0.5-1, or 25%@0-0.5,100%@0.5-1. Enter draws"
        pieces = gr.Textbox(label="Schedule in place of the budget", info=info, elem_id="pieces")
    components = [condition, seed, budget, pieces, steps, guidance, scale, weak]
    assert len(components) == len(CONTROLS)
    return Controls(components, cost, schedule, run, cancel, dice, thumbnails, buttons)
