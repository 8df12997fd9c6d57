"""The Load tab: the budget and the deadlines of a running `elit serve`, and a burst that lowers the budget."""

import json
import random
from collections import Counter
from typing import Any

import gradio as gr
import httpx
import pandas as pd
from prometheus_client.parser import text_string_to_metric_families

from elit.config import require
from elit.play.playground import HIDDEN, PROGRESS, RUN, facts_html, report_errors
from elit.serve.loadtest import run_loadtest, summarize

CALM_SECONDS = 10  # After a burst, with one request each.
HISTORY = 120  # Readings that the charts show.


class Service:
    """A running service. url: with or without /v1. Raises ValueError where none answers."""

    def __init__(self, url: str, key: str | None = None):
        require(url.startswith(("http://", "https://")), "service", url, "http://HOST:PORT")
        self.url, self.key = url.rstrip("/").removesuffix("/v1"), key
        info = json.loads(self.get("/v1/models"))["data"][0]["elit"]
        self.prompts = ["a picture"] if info["text"] else [str(number) for number in range(info["classes"])]

    def get(self, path: str) -> str:
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        try:
            answer = httpx.get(self.url + path, headers=headers, timeout=10, trust_env=False)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ValueError(f"service {self.url!r} does not answer ({type(error).__name__})") from None
        if answer.status_code != 200:
            hint = "; set --api-key or ELIT_API_KEY" if answer.status_code == 401 else ""
            raise ValueError(f"service {self.url!r} answers {answer.status_code}{hint}")
        return answer.text

    def counts(self) -> Counter[str]:
        """Images and their latents, deadlines met ("yes") and missed ("no"), since the service began."""
        counts = Counter[str]()
        for family in text_string_to_metric_families(self.get("/metrics")):
            for name, labels, value, *_ in family.samples:
                if name == "elit_images_total" and labels["budget"].isdecimal():
                    counts.update({"images": value, "latents": value * int(labels["budget"])})
                elif name == "elit_deadlines_total":
                    counts.update({labels["met"]: value})
        return counts


def build_load(service: Service, tab: gr.Tab) -> None:
    held = gr.State((None, []))
    options: dict[str, Any] = {"x": "seconds", "height": 200, "x_title": "seconds"}
    budget = gr.LinePlot(y="latents", title="Budget served, latents a group", elem_id="budgets", **options)
    met = gr.LinePlot(y="percent", title="Answered in time, % of requests", y_lim=[0, 105], elem_id="met", **options)
    with gr.Row():
        requests = gr.Slider(1, 64, value=32, step=1, label="Requests", elem_id="requests")
        seconds = gr.Slider(1, 10, value=4, step=1, label="Seconds", elem_id="seconds")
        deadline = gr.Slider(0.5, 30, value=10, step=0.5, label="Deadline, s", elem_id="deadline")
    burst = gr.Button("Send the burst", variant="primary", elem_id="burst")
    outcome = gr.HTML(elem_id="burst-words")
    timer = gr.Timer(1.0, active=False)

    @report_errors(outcome)
    def update(held: tuple[Counter[str] | None, list[tuple[float, float | None, float | None]]]) -> object:
        (before, rows), now = held, service.counts()
        new = now - (before or now)
        latents = new["latents"] / new["images"] if new["images"] else None
        percent = 100 * new["yes"] / judged if (judged := new["yes"] + new["no"]) else None
        rows = [*rows[1 - HISTORY :], (rows[-1][0] + 1 if rows else 0, latents, percent)]
        frame = pd.DataFrame(rows, columns=["seconds", "latents", "percent"], dtype=float)
        return (now, rows), frame[["seconds", "latents"]].dropna(), frame[["seconds", "percent"]].dropna()

    @report_errors(outcome)
    def send(count: int, within: int, deadline_s: float, progress: gr.Progress = PROGRESS) -> str:
        times = sorted(random.uniform(0, within) for _ in range(count))
        times += [within + second for second in range(CALM_SECONDS)]
        options: dict[str, Any] = {"prompts": service.prompts, "deadline_ms": 1e3 * deadline_s, "key": service.key}
        options["progress"] = lambda done, total: progress((done, total), desc="answers")
        outcomes = run_loadtest(service.url, times, **options)
        summary = summarize(outcomes)
        text = f"{len(outcomes)} requests: {summary['refused']:.0%} refused, {summary['late']:.0%} late"
        if summary["mean_budget"] is not None:
            text += f"; median latency {summary['p50_ms']:.0f} ms, {summary['mean_budget']:.1f} latents on average"
        return facts_html(f"{text}.")

    tab.select(lambda: gr.Timer(active=True), outputs=timer, **HIDDEN)
    timer.tick(update, held, [held, budget, met], **HIDDEN)
    options = RUN | {"concurrency_id": "burst", "show_progress_on": [outcome]}
    burst.click(send, [requests, seconds, deadline], outcome, **options)
