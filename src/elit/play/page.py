"""The page: controls on one side, tabs on the other."""

from typing import TYPE_CHECKING

import gradio as gr

from elit.play.compare_tab import build_compare
from elit.play.controls import build_controls
from elit.play.draw_tab import build_draw
from elit.play.inside_tab import build_inside
from elit.play.plane_tab import build_plane
from elit.play.playground import Playground
from elit.play.renderer import Renderer
from elit.sampling.engine import NetworkEngine

if TYPE_CHECKING:
    from elit.play.service import LoadMonitor

NAME_PICTURES = """() => {
    const name = img => { img.alt ||= img.closest('.block').querySelector('label').textContent.trim() || 'Picture'; };
    new MutationObserver(() => document.querySelectorAll('.picture img, #plane img').forEach(name))
        .observe(document.body, {childList: true, subtree: true});
}"""
"""Gives pictures their label as the text of screen readers, which Gradio leaves empty."""


def build_page(renderer: Renderer, monitor: "LoadMonitor | None" = None) -> gr.Blocks:
    """The page of a renderer, not yet served. monitor: of a service, whose load then has a tab."""
    play = Playground(renderer)
    with gr.Blocks(title="elit playground", analytics_enabled=False, delete_cache=(1800, 3600)) as page:
        text = f"# Playground\nAll pictures come from the same weights: {play.engine.name}. The budget is the number "
        gr.Markdown(text + "of latents that the middle of the network works on. Fewer latents cost less.")
        present = gr.State(None)
        with gr.Row(elem_classes="sides"):
            with gr.Column(scale=5, min_width=320):
                controls = build_controls(play)
            with gr.Column(scale=7, min_width=320), gr.Tabs() as tabs:
                with gr.Tab("Dial"):
                    build_draw(page, play, controls, present)
                if play.engine.budgets:
                    with gr.Tab("Compare") as tab:
                        build_compare(play, controls, tab)
                if isinstance(play.engine, NetworkEngine):
                    with gr.Tab("Plane") as tab:
                        build_plane(play, controls, tab, present)
                    if play.engine.network.latent_interface is not None:
                        with gr.Tab("Inside") as tab:
                            build_inside(play, play.engine, controls, tab, present)
                if monitor is not None:
                    from elit.play.load_tab import build_load  # needs the extra serve

                    with gr.Tab("Load"):
                        build_load(monitor, tabs, "Load")
        page.queue(default_concurrency_limit=4, max_size=64)
        page.unload(play.cancel)
        page.load(None, js=NAME_PICTURES, api_visibility="private")
    return page
