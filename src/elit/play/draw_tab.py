"""The Dial tab: a picture, what it cost, its file and its link."""

import random
from functools import partial

import gradio as gr

from elit.play.charts import lines_chart
from elit.play.controls import Controls
from elit.play.playground import HIDDEN, PROGRESS, RUN, Options, Playground, report_errors
from elit.play.request import MAX_SEED, Request
from elit.play.style import describe_cost, describe_picture
from elit.sampling.settings import Sampling

SET_QUERY = "(link) => { if (link) history.replaceState(null, '', '?' + link); }"


def build_draw(page: gr.Blocks, play: Playground, controls: Controls, present: gr.State) -> None:
    """The picture, and all events that draw it."""
    engine, start, values = play.engine, play.renderer.start, controls.values
    full = engine.budgets[-1] if engine.budgets else 0
    image = gr.Image(
        type="filepath", label="Picture", show_label=False, interactive=False, buttons=["fullscreen"], height=420,
        elem_classes="picture", elem_id="picture",
    )  # fmt: skip
    facts = gr.HTML(elem_id="facts")
    download = gr.DownloadButton("Download, settings inside", interactive=False, elem_id="download")
    link = gr.Textbox(visible="hidden", elem_id="link")

    @report_errors(facts)
    def draw(visitor: gr.Request, progress: gr.Progress = PROGRESS, *given: object) -> object:
        request = play.request(given)
        picture = play.run(visitor, lambda tick: play.renderer.draw(request, tick), progress)
        path = play.save(picture)
        file = gr.DownloadButton(value=path, interactive=True)
        return path, describe_picture(picture), file, picture, request.query()

    @report_errors(controls.cost)
    def update_cost(*given: object) -> tuple[str, str]:
        request = play.request(given)
        cost = play.renderer.cost(request)
        budget = f"budget {request.values()['budget']} of {full} latents" if full else "no latents: a baseline"
        budgets = play.renderer.step_budgets(request.sampling)
        points = [(step / len(budgets), latents or 0.0) for step, latents in enumerate(budgets)]
        chart = lines_chart({"latents a group": points}, "t: 0 is noise, 1 is data", "", "Budget of every step", full)
        return describe_cost(cost, budget), chart

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

    drawing: Options = RUN | {
        "inputs": values,
        "outputs": [image, facts, download, present, link],
        "show_progress_on": [facts],
        "trigger_mode": "always_last",
    }
    condition, seed, budget, schedule = values[:4]
    submit = condition.submit if engine.takes_text else condition.input
    rolled = controls.dice.click(lambda: random.randint(0, MAX_SEED), outputs=seed, **HIDDEN)
    opened = page.load(open_link, outputs=values, **HIDDEN)
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
