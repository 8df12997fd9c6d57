"""The tabs that draw with the network of this process: Dial, Compare, Plane, Inside."""

import random
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import gradio as gr
import pandas as pd
from PIL import Image
from torch import Tensor

from elit.budgets import evenly_spaced
from elit.evaluate.plots import compute_quality
from elit.evaluate.sweep import read_table
from elit.play.playground import HIDDEN, PROGRESS, RUN, SHOWN, Controls, Playground, facts_html, report_errors
from elit.play.renderer import Cost, Picture, Request, attention_maps, difference, enlarge, overlay, trajectory
from elit.sampling.engine import NetworkEngine
from elit.sampling.settings import Sampling

SET_QUERY = "(link) => { if (link) history.replaceState(null, '', '?' + link); }"
LARGE = SHOWN | {"buttons": ["fullscreen"], "height": 400, "elem_classes": "picture"}
GFLOPS = (("gflops", "GFLOPs per image"),)
NOTHING = "The quality of this model was not measured: there is no sweep.jsonl beside it. elit sweep MODEL makes one."


def build_dial(page: gr.Blocks, play: Playground, controls: Controls, present: gr.State) -> None:
    """A picture, what it cost, its file and its link, and all events that draw it."""
    engine, start, values = play.engine, play.renderer.start, controls.values
    full = engine.budgets[-1] if engine.budgets else 0
    image = gr.Image(type="filepath", label="Picture", show_label=False, elem_id="picture", **LARGE)
    facts = gr.HTML(elem_id="facts")
    download = gr.DownloadButton("Download, settings inside", interactive=False, elem_id="download")
    link = gr.Textbox(visible="hidden", elem_id="link")

    @report_errors(facts)
    def draw(visitor: gr.Request, progress: gr.Progress = PROGRESS, *given: object) -> object:
        request = play.request(given)
        picture = play.run(visitor, lambda tick: play.renderer.draw(request, tick), progress)
        path = play.save(picture)
        file = gr.DownloadButton(value=path, interactive=True)
        return path, describe_picture(picture), file, picture, urlencode(request.values())

    @report_errors(controls.cost)
    def update_cost(*given: object) -> object:
        request = play.request(given)
        cost = play.renderer.cost(request)
        budget = f"budget {request.values()['budget']} of {full} latents" if full else "no latents: a baseline"
        budgets = play.renderer.step_budgets(request.sampling)
        times = [step / len(budgets) for step in range(len(budgets))]
        return describe_cost(cost, budget), pd.DataFrame({"t": times, "latents": budgets}, dtype=float)

    def open_link(visitor: gr.Request) -> list[object]:
        try:
            return start.updated(dict(visitor.query_params)).controls(engine.budgets)
        except ValueError as error:
            gr.Warning(f"This link does not fit the model: {error}", title="Link")
            return start.controls(engine.budgets)

    def set_example(sampling: Sampling, condition: object, seed: object) -> list[object]:
        return [condition, seed, *Request(start.condition, sampling).controls(engine.budgets)[2:]]

    def choose_class(event: gr.SelectData) -> str:
        return engine.classes[event.index]

    drawing = RUN | {"inputs": values, "outputs": [image, facts, download, present, link]}
    drawing |= {"show_progress_on": [facts], "trigger_mode": "always_last"}
    condition, seed, budget, schedule = values[:4]
    submit = condition.submit if engine.takes_text else condition.input
    rolled = controls.dice.click(lambda: random.getrandbits(31), outputs=seed, **HIDDEN)
    opened = page.load(open_link, outputs=values, **HIDDEN | {"queue": True})  # else no warning is shown
    before = [rolled, opened, budget.input(lambda: "", outputs=schedule, **HIDDEN)]
    if controls.thumbnails is not None:
        before.append(controls.thumbnails.select(choose_class, outputs=condition, **HIDDEN))
        made = play.renderer.thumbnails
        page.load(made, outputs=controls.thumbnails, show_progress="hidden", api_visibility="private")
    for button, sampling in controls.examples:
        before.append(button.click(partial(set_example, sampling), inputs=values[:2], outputs=values, **HIDDEN))
    events = [gr.on([controls.run.click, schedule.submit, seed.submit, submit], draw, **drawing)]
    events += [event.then(draw, **drawing) for event in before]
    changes = [page.load, *(each.change for each in values), present.change]
    gr.on(changes, update_cost, values, [controls.cost, controls.schedule], trigger_mode="always_last", **HIDDEN)
    link.change(None, inputs=link, js=SET_QUERY, api_visibility="private")
    controls.cancel.click(play.cancel, cancels=events, **HIDDEN)


def describe_cost(cost: Cost, budget: str) -> str:
    """GFLOPs with a meter, milliseconds and expected quality of the present settings."""
    share, time, quality = cost.gflops / cost.full_gflops, "time: after a run", "quality: no sweep beside this model"
    if cost.measured_ms is not None:
        time = f"<b>{cost.measured_ms:.0f} ms</b> measured"
    elif cost.predicted_ms is not None:
        time = f"<b>{cost.predicted_ms:.0f} ms</b> by this machine's profile"
    if cost.quality is not None:
        quality = f"expected {escape(str(cost.metric))} <b>{cost.quality:.4g}</b>"
    elif cost.metric is not None:
        quality = f"{escape(cost.metric)}: not measured at these settings"
    return (
        f'<div class="facts" aria-live="polite"><progress aria-hidden="true" value="{min(share, 1):.3f}"></progress>'
        f"<b>{cost.gflops:.4g} GFLOPs</b> a picture, {share:.0%} of the cost at full budget · {time}<br>"
        f'{quality} · <span class="quiet">{escape(budget)}</span></div>'
    )


def describe_picture(picture: Picture) -> str:
    request = picture.request
    text = f"{request.condition} · seed {request.sampling.seed} · budget {request.values()['budget']} · "
    return f'<div class="facts">{escape(text)}<b>{picture.gflops:.4g} GFLOPs</b> · <b>{picture.ms:.0f} ms</b></div>'


def build_compare(play: Playground, controls: Controls, tab: gr.Tab) -> None:
    """The same seed at two budgets, their difference, and a strip of all budgets."""
    budgets = play.engine.budgets
    low, high = budgets[0], budgets[-1]
    latents: dict[str, Any] = {"minimum": low, "maximum": high, "step": low}
    with gr.Row():
        quarter = max(low, high // 4 // low * low)
        first = gr.Slider(label="Left: latents per window", value=quarter, elem_id="left", **latents)
        second = gr.Slider(label="Right: latents per window", value=high, elem_id="right", **latents)
    with gr.Row():
        compare = gr.Button("Compare the two", variant="primary", elem_id="compare")
        strip = gr.Button("Draw all budgets", elem_id="strip")
    with gr.Row():
        slider = gr.ImageSlider(label="Left and right", elem_id="slider", elem_classes="picture", **SHOWN)
        apart = gr.Image(label="Difference", elem_id="apart", elem_classes="picture", **SHOWN)
    facts = gr.HTML(elem_id="compared")
    title, frames = "All budgets, the same seed", {"columns": 4, "height": "auto", "elem_classes": "frames"}
    gallery = gr.Gallery(label=title, elem_id="every", **frames, **SHOWN)

    def draw_at(visitor: gr.Request, progress: gr.Progress, given: Sequence[object], *latents: float) -> list[Picture]:
        request = play.request(given)
        wanted = [replace(request, sampling=replace(request.sampling, budget=int(each))) for each in latents]
        return play.run(visitor, lambda tick: [play.renderer.draw(each, tick) for each in wanted], progress)

    @report_errors(facts)
    def draw_two(visitor: gr.Request, one: int, two: int, progress: gr.Progress = PROGRESS, *given: object) -> object:
        pictures = draw_at(visitor, progress, given, one, two)
        image, largest = difference(*(picture.image() for picture in pictures))
        scale = facts_html(f"White in the difference is {largest:.0%} of the range from black to white.", "quiet")
        text = "".join(describe_picture(picture) for picture in pictures) + scale
        return tuple(enlarge(picture.image()) for picture in pictures), image, text

    @report_errors(facts)
    def draw_all(visitor: gr.Request, progress: gr.Progress = PROGRESS, *given: object) -> object:
        frames = []
        for picture in draw_at(visitor, progress, given, *evenly_spaced(budgets, 16)):
            caption = f"{picture.request.sampling.budget} of {high}: {picture.gflops:.3g} GFLOPs, {picture.ms:.0f} ms"
            frames.append((enlarge(picture.image(), 192), caption))
        return {gallery: frames}

    inputs, outputs = [first, second, *controls.values], [slider, apart, facts]
    starts = [tab.select, compare.click] if isinstance(play.engine, NetworkEngine) else [compare.click]
    events: list[Any] = [
        gr.on(starts, draw_two, inputs, outputs, show_progress_on=[facts], **RUN),
        strip.click(draw_all, controls.values, [gallery, facts], **RUN),
    ]
    controls.cancel.click(None, cancels=events, api_visibility="private")


def build_plane(play: Playground, controls: Controls, tab: gr.Tab, present: gr.State) -> None:
    """The compute–quality plane of a sweep, the present settings in it, and settings for a target."""
    renderer, values = play.renderer, controls.values
    chart = gr.Image(label="Compute–quality plane", elem_id="plane", visible=renderer.table is not None, **SHOWN)
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


def build_inside(play: Playground, engine: NetworkEngine, controls: Controls, tab: gr.Tab, present: gr.State) -> None:
    """Attention of Read over the picture, and the states of its run."""
    maps = gr.State(None)
    inspect = gr.Button("Inspect this picture", variant="primary", elem_id="look")
    with gr.Row():
        image = gr.Image(label="Attention of the latent, in orange", elem_id="overlay", **LARGE)
        with gr.Column():
            latent = gr.Slider(1, engine.budgets[-1], value=1, step=1, label="Latent", elem_id="latent")
            step = gr.Slider(1, 16, value=8, step=1, label="Step: from noise to picture", elem_id="step")
            caption = gr.HTML(elem_id="looked")
    options = SHOWN | {"columns": 5, "height": "auto", "elem_classes": "frames"}
    frames = gr.Gallery(label="From noise to picture", elem_id="frames", **options)

    def show(held: tuple[list[float], Tensor, Image.Image] | None, latent: float, step: float) -> tuple[Any, str]:
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

    event = gr.on(
        [tab.select, inspect.click], inspect_picture, present, [maps, latent, step, image, caption, frames], **RUN
    )
    moved = HIDDEN | {"trigger_mode": "always_last"}
    gr.on([latent.input, step.input], show, [maps, latent, step], [image, caption], **moved)
    controls.cancel.click(None, cancels=[event], api_visibility="private")
