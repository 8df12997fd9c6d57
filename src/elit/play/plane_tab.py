"""The tab of the compute–quality plane: what a sweep measured, where the dial stands, and a plan for a target."""

from typing import Any

import gradio as gr

from elit.evaluate.plane import pareto_front
from elit.evaluate.score import DISTANCES
from elit.planner.quality import Quality
from elit.play.charts import Mark, plane_chart
from elit.play.controls import Controls
from elit.play.dial import Dial
from elit.play.engine import NetworkEngine
from elit.play.handlers import HIDDEN, PROGRESS, RUN, Playground, ticker, with_page_errors
from elit.play.planning import dial_of_plan, plan_for
from elit.play.style import quiet, wrong

NOTHING = (
    "Nobody has measured this model's quality: there is no sweep.jsonl beside it. elit sweep MODEL makes one, and then "
    "its points stand here and plans are chosen by them."
)


def build_plane(play: Playground, engine: NetworkEngine, controls: Controls, tab: gr.Tab, present: gr.State) -> None:
    values = controls.values
    chart = gr.HTML(elem_id="plane")
    with gr.Row():
        unit = gr.Radio(["GFLOPs a picture", "ms a picture"], value="GFLOPs a picture", label="Target", elem_id="unit")
        target = gr.Number(None, label="At most", minimum=0, elem_id="target")
        plan = gr.Button("Plan", variant="primary", elem_id="plan")
    words = gr.HTML(elem_id="planned")

    def show(*given: Any) -> str:
        if engine.table is None:
            return quiet(NOTHING)
        try:
            cost = engine.cost(play.settings(Dial.from_controls(given)))
        except ValueError as error:
            return wrong(str(error))
        return chart_of(engine, engine.table, (cost.gflops, cost.quality))

    def planned(
        request: gr.Request, wanted: str, most: float | None, progress: gr.Progress = PROGRESS, *given: Any
    ) -> Any:
        if not most or most <= 0:
            raise gr.Error("Give a number above 0.", title="Target", print_exception=False)
        name = "target_gflops" if wanted.startswith("G") else "target_ms"
        best = play.run(
            request.session_hash, lambda stop: plan_for(engine, name, float(most), ticker(progress, "measuring"), stop)
        )
        dial = with_page_errors(lambda: dial_of_plan(play.dial(given), best, engine.budgets))
        summary = f'<div class="facts"><b>{best.describe()}</b><br>{best}</div>'
        return [summary, *dial.controls()]

    gr.on([tab.select, present.change], show, values, chart, **HIDDEN)
    event = plan.click(planned, [unit, target, *values], [words, *values], show_progress_on=[words], **RUN)
    event.then(show, values, chart, **HIDDEN)
    controls.cancel.click(None, cancels=[event], api_visibility="private")


def chart_of(engine: NetworkEngine, table: Quality, present: tuple[float, float | None]) -> str:
    """The plane with the sweep's points, each with its cost by the closed form."""
    points = []
    for curve in table.curves:
        for steps, value in zip(curve.steps, curve.values, strict=True):
            gflops = engine.curve_gflops(curve, steps)
            budget = "all latents" if curve.setting.budget is None else f"budget {curve.setting.budget}"
            guide = curve.setting.guidance.kind.upper() if curve.setting.guidance else "no guidance"
            points.append((gflops, value, f"{budget}, {steps} steps, {guide}: {table.metric} {value:.4g}"))
    front = set(pareto_front([point[0] for point in points], [table.loss(point[1]) for point in points]))
    marks = [Mark(*point, front=i in front) for i, point in enumerate(points)]
    better = "lower" if table.metric in DISTANCES else "higher"
    return plane_chart(marks, table.metric, "GFLOPs a picture", present, better)
