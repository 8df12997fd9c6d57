"""The Plane tab: the compute–quality plane of a sweep, the present settings in it, and settings for a target."""

from dataclasses import replace

import gradio as gr

from elit.evaluate.plane import pareto_front
from elit.evaluate.plots import quality_label
from elit.planner.quality import Quality
from elit.play.charts import plane_chart
from elit.play.controls import Controls
from elit.play.playground import HIDDEN, PROGRESS, RUN, Playground, report_errors
from elit.play.renderer import Renderer
from elit.play.request import Request
from elit.play.style import facts_html

NOTHING = "The quality of this model was not measured: there is no sweep.jsonl beside it. elit sweep MODEL makes one."


def build_plane(play: Playground, controls: Controls, tab: gr.Tab, present: gr.State) -> None:
    renderer, values = play.renderer, controls.values
    chart = gr.HTML(elem_id="plane")
    with gr.Row():
        unit = gr.Radio(["GFLOPs a picture", "ms a picture"], value="GFLOPs a picture", label="Target", elem_id="unit")
        target = gr.Number(None, label="At most", elem_id="target")
        plan = gr.Button("Plan", variant="primary", elem_id="plan")
    outcome = gr.HTML(elem_id="planned")

    @report_errors(chart)
    def show(*given: object) -> str:
        if renderer.table is None:
            return facts_html(NOTHING, "quiet")
        cost = renderer.cost(play.request(given))
        return plane_of_table(renderer, renderer.table, (cost.gflops, cost.quality))

    @report_errors(outcome)
    def set_plan(
        visitor: gr.Request, unit: str, target: float | None, progress: gr.Progress = PROGRESS, *given: object
    ) -> list[object]:
        request, (gflops, ms) = play.request(given), (target, None) if unit.startswith("G") else (None, target)
        best = play.run(visitor, lambda tick: renderer.plan(gflops, ms, tick), progress, "measuring")
        sampling = replace(request.sampling, steps=best.steps, budget=best.budget, guidance=best.guidance)
        return [facts_html(str(best)), *Request(request.condition, sampling).controls(play.engine.budgets)]

    gr.on([tab.select, present.change], show, values, chart, **HIDDEN)
    event = plan.click(set_plan, [unit, target, *values], [outcome, *values], show_progress_on=[outcome], **RUN)
    event.then(show, values, chart, **HIDDEN)
    controls.cancel.click(None, cancels=[event], api_visibility="private")


def plane_of_table(renderer: Renderer, table: Quality, present: tuple[float, float | None]) -> str:
    """The plane of a sweep's table, each setting with its cost by the closed form. present: cost and quality."""
    settings = [(curve.sampling(steps), curve.at(steps)) for curve in table.curves for steps in curve.steps]
    points = [
        (renderer.engine.gflops(each), value or 0.0, f"{each.describe()}: {value:.4g}") for each, value in settings
    ]
    front = pareto_front([cost for cost, _, _ in points], [table.loss(value) for _, value, _ in points])
    return plane_chart(points, front, ("GFLOPs a picture", quality_label(table.metric)), present)
