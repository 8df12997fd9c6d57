"""The tab that draws: a picture, what it cost, its file and its link."""

import random
from functools import partial
from typing import Any

import gradio as gr

from elit.play.charts import schedule_chart
from elit.play.controls import Controls
from elit.play.dial import Dial
from elit.play.handlers import HIDDEN, PROGRESS, RUN, STOPPED, Playground, ticker
from elit.play.style import quiet, wrong
from elit.play.words import cost_words, picture_words

REMEMBER = "(link) => { if (link) history.replaceState(null, '', '?' + link); }"


def build_dial(page: gr.Blocks, play: Playground, controls: Controls, present: gr.State) -> None:
    """The picture, and all that draws it."""
    engine, start, values = play.engine, play.opening.dial, controls.values
    image = gr.Image(
        type="filepath", show_label=False, interactive=False, buttons=["fullscreen"], elem_classes="picture",
        elem_id="picture", height=420,
    )  # fmt: skip
    facts = gr.HTML(elem_id="facts")
    with gr.Row():
        download = gr.DownloadButton("Download, settings inside", interactive=False, elem_id="download")
    link = gr.Textbox(visible="hidden", elem_id="link")

    def draw(request: gr.Request, progress: gr.Progress = PROGRESS, *given: Any) -> Any:
        try:
            dial = play.dial(given)
            picture = play.draw(dial, ticker(progress, "step"), request.session_hash)
        except gr.Error as error:  # beside the picture, which stays
            if error.title == STOPPED:  # the button has said so
                return (gr.skip(),) * 5
            gr.Warning(error.message, title=error.title, duration=6)
            return gr.skip(), wrong(error.message), gr.skip(), gr.skip(), gr.skip()
        path = play.save(picture)
        file = gr.DownloadButton(value=path, interactive=True)
        return path, picture_words(picture), file, picture, dial.query()

    def price(*given: Any) -> tuple[str, str]:
        try:
            dial = Dial.from_controls(given)
            settings = play.settings(dial)
            engine.check(settings)
            cost = engine.cost(settings)
        except ValueError as error:
            return wrong(str(error)), quiet("")
        most = engine.budgets[-1] if engine.budgets else 0
        latents = f"budget {dial.budget} of {most} latents" if most else "no latents: a baseline"
        return cost_words(cost, latents), schedule_chart(dial.spans(), most) if most else ""

    def opened(request: gr.Request) -> list[Any]:
        try:
            return start.from_query(dict(request.query_params), engine.budgets).controls()
        except ValueError as error:
            gr.Warning(f"This link does not fit the model: {error}", title="Link")
            return start.controls()

    def example(dial: Dial, condition: Any, seed: Any) -> list[Any]:
        return [condition, seed, *dial.controls()[2:]]

    def roll() -> int:
        return random.randrange(2**31)

    outputs = [image, facts, download, present, link]
    drawing: dict[str, Any] = {
        "inputs": values,
        "outputs": outputs,
        "show_progress_on": [facts],
        "trigger_mode": "always_last",
    } | RUN
    condition, seed, budget = values[:3]
    submits = [condition.submit] if engine.takes_text else [condition.input]
    rolled = controls.dice.click(roll, outputs=seed, **HIDDEN)
    events: list[Any] = [
        gr.on([controls.run.click, budget.input, seed.submit, *submits], draw, **drawing),
        rolled.then(draw, **drawing),
    ]
    if controls.thumbnails is not None:

        def choose(event: gr.SelectData) -> str:
            return engine.classes[event.index]

        selection = controls.thumbnails.select(choose, outputs=condition, **HIDDEN)
        events.append(selection.then(draw, **drawing))
    for button, dial in controls.examples:
        settled = button.click(partial(example, dial), inputs=values[:2], outputs=values, **HIDDEN)
        events.append(settled.then(draw, **drawing))
    first = page.load(opened, outputs=values, **HIDDEN)
    events.append(first.then(draw, **drawing))
    if controls.thumbnails is not None:
        thumbnails = play.opening.thumbnails
        page.load(thumbnails, outputs=controls.thumbnails, show_progress="hidden", api_visibility="private")
    turned = [page.load, *(each.change for each in values), present.change]
    gr.on(turned, price, values, [controls.cost, controls.schedule], trigger_mode="always_last", **HIDDEN)
    link.change(None, inputs=link, js=REMEMBER, api_visibility="private")

    def cancel(request: gr.Request) -> None:
        stopped = play.runs.stop(request.session_hash)
        gr.Info("The run was cancelled." if stopped else "Nothing is running.", duration=4)

    controls.cancel.click(cancel, cancels=events, **HIDDEN)
