"""The page: controls on one side, what they make on the other, a tab for each way to look at it."""

from html import escape
from typing import TYPE_CHECKING

import gradio as gr

from elit.play.compare_tab import build_compare
from elit.play.controls import build_controls
from elit.play.dial_tab import build_dial
from elit.play.engine import NetworkEngine
from elit.play.handlers import Playground
from elit.play.inside_tab import build_inside
from elit.play.opening import Opening
from elit.play.plane_tab import build_plane

if TYPE_CHECKING:
    from elit.play.service import LoadMonitor


def build_page(opening: Opening, monitor: "LoadMonitor | None" = None) -> gr.Blocks:
    """The page of an engine, not yet served. monitor: of a service, whose load then has a tab."""
    engine, play = opening.engine, Playground(opening)
    with gr.Blocks(title="elit playground", analytics_enabled=False, delete_cache=(1800, 3600)) as page:
        words = f"All pictures come from the same weights: {escape(engine.name)}. "
        words += "The budget says on how many latents the middle of the network works. Fewer cost less."
        gr.HTML(f'<div class="head"><h1>elit playground</h1><p>{words}</p></div>')
        present = gr.State(None)
        with gr.Row(elem_classes="sides"):
            with gr.Column(scale=5, min_width=320):
                controls = build_controls(opening)
            with gr.Column(scale=7, min_width=320), gr.Tabs() as tabs:
                with gr.Tab("Dial"):
                    build_dial(page, play, controls, present)
                if engine.budgets:
                    with gr.Tab("Compare"):
                        build_compare(play, controls)
                if isinstance(engine, NetworkEngine):
                    with gr.Tab("Plane") as plane:
                        build_plane(play, engine, controls, plane, present)
                    if engine.can_look_inside:
                        with gr.Tab("Inside"):
                            build_inside(play, engine, controls, present)
                if monitor is not None:
                    from elit.play.load_tab import build_load  # needs the extra serve

                    with gr.Tab("Load"):
                        build_load(monitor, tabs, "Load")
        page.queue(default_concurrency_limit=4, max_size=64)
        page.unload(play.left)
    return page
