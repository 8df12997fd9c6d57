"""The Plane tab: the compute–quality plane of a sweep, the present settings in it, and settings for a target."""

import tempfile
from dataclasses import replace
from pathlib import Path

import gradio as gr

from elit.evaluate.plane import read_table
from elit.evaluate.plots import compute_quality
from elit.play.controls import NO_BUTTONS, Controls
from elit.play.playground import HIDDEN, PROGRESS, RUN, Playground, report_errors
from elit.play.request import Request
from elit.play.style import facts_html

GFLOPS = (("gflops", "GFLOPs per image"),)
NOTHING = "The quality of this model was not measured: there is no sweep.jsonl beside it. elit sweep MODEL makes one."


def build_plane(play: Playground, controls: Controls, tab: gr.Tab, present: gr.State) -> None:
    renderer, values = play.renderer, controls.values
    chart = gr.Image(label="Compute–quality plane", elem_id="plane", visible=renderer.table is not None, **NO_BUTTONS)
    with gr.Row():
        unit = gr.Radio(["GFLOPs a picture", "ms a picture"], value="GFLOPs a picture", label="Target", elem_id="unit")
        target = gr.Number(None, label="At most", elem_id="target")
        plan = gr.Button("Plan", variant="primary", elem_id="plan")
    outcome = gr.HTML(facts_html("" if renderer.table else NOTHING, "quiet"), elem_id="planned")

    @report_errors(outcome)
    def show(*given: object) -> object:
        table = renderer.table
        assert table is not None
        cost, path = renderer.cost(play.request(given)), Path(tempfile.mkdtemp(dir=play.folder)) / "plane.png"
        points = [point for point in read_table(table.path) if point.scores.get(table.metric) is not None]
        compute_quality(points, table.metric, path, GFLOPS, present=(cost.gflops, cost.quality))
        return {chart: str(path)}

    @report_errors(outcome)
    def set_plan(
        visitor: gr.Request, unit: str, target: float | None, progress: gr.Progress = PROGRESS, *given: object
    ) -> list[object]:
        request, (gflops, ms) = play.request(given), (target, None) if unit.startswith("G") else (None, target)
        best = play.run(visitor, lambda tick: renderer.plan(gflops, ms, tick), progress, "measuring")
        sampling = replace(request.sampling, steps=best.steps, budget=best.budget, guidance=best.guidance)
        return [facts_html(str(best)), *Request(request.condition, sampling).controls(play.engine.budgets)]

    event = plan.click(set_plan, [unit, target, *values], [outcome, *values], show_progress_on=[outcome], **RUN)
    if renderer.table is not None:
        gr.on([tab.select, present.change], show, values, [chart, outcome], **HIDDEN)
        event.then(show, values, [chart, outcome], **HIDDEN)
    controls.cancel.click(None, cancels=[event], api_visibility="private")
