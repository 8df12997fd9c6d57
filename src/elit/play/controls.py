"""The controls of the page, the same for all tabs."""

from dataclasses import dataclass
from typing import Any

import gradio as gr

from elit.play.dial import CONTROLS, Dial, examples
from elit.play.opening import Opening


@dataclass
class Controls:
    """The components, those that set something in the order of `CONTROLS`."""

    values: list[Any]
    cost: gr.HTML
    schedule: gr.HTML
    run: gr.Button
    cancel: gr.Button
    dice: gr.Button
    thumbnails: gr.Gallery | None
    examples: list[tuple[gr.Button, Dial]]
    """Buttons, and where each puts the dial; class or prompt and seed stay."""


def build_controls(opening: Opening) -> Controls:
    engine, start = opening.engine, opening.dial
    counts = engine.budgets
    condition: Any
    if engine.takes_text:
        condition = gr.Textbox(start.condition, label="Prompt", info="Enter draws", max_lines=2)
    else:
        condition = gr.Dropdown(list(engine.classes), value=start.condition, label="Class", allow_custom_value=True)
    thumbnails = None
    if opening.shows_classes:
        thumbnails = gr.Gallery(
            label="Classes", columns=5, height="auto", allow_preview=False, object_fit="contain",
            interactive=False, buttons=[],
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
    with gr.Row(elem_classes="examples", elem_id="examples"):
        buttons = [
            (gr.Button(name, size="sm", min_width=60), dial) for name, dial in examples(start, counts, engine.guidances)
        ]
    with gr.Accordion("Steps and guidance", open=False):
        steps = gr.Slider(1, 64, value=start.steps, step=1, label="Steps", elem_id="steps")
        kinds = [(kind if kind == "none" else kind.upper(), kind) for kind in engine.guidances]
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
    return Controls(values, cost, schedule, run, cancel, dice, thumbnails, buttons)
