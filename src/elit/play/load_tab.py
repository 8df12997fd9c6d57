"""The Load tab: a service's queue, budget and latency over time, and a burst that lowers the budget."""

from collections.abc import Sequence

import gradio as gr

from elit.play.charts import Points, lines_chart
from elit.play.playground import HIDDEN, PROGRESS, RUN, report_errors
from elit.play.service import LoadMonitor, Reading, describe_burst
from elit.play.style import facts_html


def build_load(monitor: LoadMonitor, tabs: gr.Tabs, label: str) -> None:
    """label: of this tab; the charts are updated each second while it is open."""
    charts = gr.HTML(elem_id="load")
    with gr.Row():
        requests = gr.Slider(1, 64, value=32, step=1, label="Requests", elem_id="requests")
        seconds = gr.Slider(1, 10, value=4, step=1, label="Seconds", elem_id="seconds")
        deadline = gr.Slider(0.5, 30, value=10, step=0.5, label="Deadline, s", elem_id="deadline")
    burst = gr.Button("Send the burst", variant="primary", elem_id="burst")
    outcome = gr.HTML(elem_id="burst-words")
    timer = gr.Timer(1.0, active=False)

    @report_errors(charts)
    def update() -> str:
        return load_charts(monitor.read())

    def activate(event: gr.SelectData) -> gr.Timer:
        return gr.Timer(active=event.value == label)

    @report_errors(outcome)
    def send(count: float, within: float, deadline_s: float, progress: gr.Progress = PROGRESS) -> str:
        def tick(done: int, total: int) -> None:
            progress((done, total), desc="answers")

        return facts_html(describe_burst(monitor.burst(int(count), int(within), 1e3 * deadline_s, tick)))

    tabs.select(activate, outputs=timer, **HIDDEN)
    timer.tick(update, outputs=charts, **HIDDEN)
    options = RUN | {"concurrency_id": "burst"}
    burst.click(send, [requests, seconds, deadline], outcome, show_progress_on=[outcome], **options)


def load_charts(readings: Sequence[Reading]) -> str:
    """Three charts over the last seconds; the newest reading is at 0."""

    def line(name: str) -> Points:
        values = [(each.at - readings[-1].at, getattr(each, name)) for each in readings]
        return [(at, value) for at, value in values if value is not None]

    unanswered = {"without an answer": line("unanswered"), "of those, waiting": line("waiting")}
    charts = [
        ("Requests without an answer", "requests", unanswered),
        ("Budget served", "latents a group", {"mean of the images served": line("budget")}),
        ("Latency", "ms", {"mean of the answers": line("latency_ms")}),
    ]
    return "".join(lines_chart(lines, "seconds; 0 is now", label, title) for title, label, lines in charts)
