"""The tab that watches a service: queue, budget and latency as lines, and a burst under which the budget gives way."""

from typing import Any

import gradio as gr

from elit.play.charts import lines_chart
from elit.play.handlers import HIDDEN, PROGRESS, ticker, with_page_errors
from elit.play.service import MOST_REQUESTS, MOST_SECONDS, LoadMonitor, Reading, burst_words
from elit.play.style import wrong


def build_load(monitor: LoadMonitor, tabs: gr.Tabs, label: str) -> None:
    """label: of this tab; the lines are read anew each second while it is open."""
    lines = gr.HTML(elem_id="load")
    with gr.Row():
        requests = gr.Slider(1, MOST_REQUESTS, value=32, step=1, label="Requests", elem_id="requests")
        seconds = gr.Slider(1, MOST_SECONDS, value=4, step=1, label="Seconds", elem_id="seconds")
        deadline = gr.Slider(0.5, 30, value=10, step=0.5, label="Deadline, s", elem_id="deadline")
    burst = gr.Button("Send the burst", variant="primary", elem_id="burst")
    words = gr.HTML(elem_id="burst-words")
    timer = gr.Timer(1.0, active=False)

    def show() -> str:
        try:
            return load_charts(monitor.read())
        except ValueError as error:
            return wrong(str(error))

    def opened(event: gr.SelectData) -> gr.Timer:
        return gr.Timer(active=event.value == label)

    def sent(count: float, within: float, patience: float, progress: gr.Progress = PROGRESS) -> str:
        outcomes = with_page_errors(
            lambda: monitor.burst(int(count), int(within), 1e3 * patience, ticker(progress, "answers"))
        )
        return f'<div class="facts" aria-live="polite">{burst_words(outcomes)}</div>'

    tabs.select(opened, outputs=timer, **HIDDEN)
    timer.tick(show, outputs=lines, **HIDDEN)
    options: dict[str, Any] = {"concurrency_id": "burst", "concurrency_limit": 1, "api_visibility": "private"}
    burst.click(sent, [requests, seconds, deadline], words, show_progress_on=[words], **options)


def load_charts(readings: list[Reading]) -> str:
    """Three drawings over the last seconds; the newest reading is at 0."""
    at = [reading.at - readings[-1].at for reading in readings]
    drawings = (
        (
            "Requests without an answer",
            "requests",
            [
                ("without an answer", [reading.unanswered for reading in readings]),
                ("of those, waiting", [reading.waiting for reading in readings]),
            ],
        ),
        ("Budget served", "latents a group", [("mean of what was served", [r.budget for r in readings])]),
        ("Latency", "ms", [("mean of the answers", [r.latency_ms for r in readings])]),
    )
    return "".join(lines_chart(at, lines, label, title) for title, label, lines in drawings)
