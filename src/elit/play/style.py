"""Style and texts of the page: nothing from another host, light and dark, one column on a phone."""

from html import escape

import gradio as gr

from elit.play.renderer import Cost, Picture

CSS = """
html { scrollbar-gutter: stable; }
:root { --color-accent: #4f46e5; } .dark { --color-accent: #a5b4fc; }
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
.picture img, .frames img, .thumbnails img { image-rendering: pixelated; }
.picture img { width: 100%; height: 100%; object-fit: contain; }
.facts { font-variant-numeric: tabular-nums; line-height: 1.5; }
.facts .quiet { color: var(--body-text-color-subdued); }
.facts .wrong { color: var(--error-text-color, #b91c1c); font-weight: 600; }
.thumbnails, .frames, .thumbnails .grid-wrap, .frames .grid-wrap { height: auto !important; min-height: 0 !important; }
.thumbnails .grid-container { grid-template-columns: repeat(5, minmax(0, 1fr)) !important; padding: 0 !important; }
.frames .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)) !important; padding: 0 !important; }
.thumbnails > label, .frames > label, .picture > label:not(.sr-only), #plane > label { position: static !important; }
.frames .grid-wrap { max-height: none; }
.thumbnails .thumbnail-item, .frames .thumbnail-item { height: auto; aspect-ratio: auto; }
.thumbnails .caption-label, .frames .caption-label {
  position: static; max-width: none; border: 0; padding: 0 .25rem; font-size: .7rem; white-space: normal;
}
.examples { gap: .4rem !important; } .examples button { padding-inline: .3rem; }
.facts progress { display: block; width: 100%; accent-color: var(--color-accent); }
.chart { width: 100%; height: auto; display: block; }
.chart .grid { stroke: var(--border-color-primary); }
.chart text { fill: var(--body-text-color-subdued); font-size: 13px; }
.chart polyline { fill: none; stroke: var(--color-accent); stroke-width: 2.5; }
.chart circle, .chart text.series-0 { fill: var(--color-accent); }
.chart polyline.series-1 { stroke: #0d9488; } .chart circle.series-1, .chart text.series-1 { fill: #0d9488; }
@media (max-width: 767px) {
  .sides { flex-direction: column-reverse !important; padding-bottom: 6rem; }
  .sides > .column { min-width: 0 !important; width: 100%; }
  #budget { position: fixed; inset: auto 0 0 0; z-index: 99; overflow: visible !important; }
  .frames .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important; }
  .chart text { font-size: 20px; }
}
"""


def theme() -> gr.themes.Base:
    """Gradio's default theme with fonts of the visitor's own machine."""
    default = gr.themes.Default(primary_hue="indigo", font=["system-ui", "sans-serif"], font_mono=["monospace"])
    contrast = {"body_text_color_subdued": "*neutral_600", "body_text_color_subdued_dark": "*neutral_300"}
    return default.set(button_primary_background_fill="*primary_600", **contrast)


def facts_html(text: str, kind: str = "") -> str:
    """A line of text; kind: "quiet" or "wrong"."""
    return f'<div class="facts" aria-live="polite"><span class="{kind}">{escape(text)}</span></div>'


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
    """The line under a picture."""
    request = picture.request
    text = f"{request.condition} · seed {request.sampling.seed} · budget {request.values()['budget']} · "
    return f'<div class="facts">{escape(text)}<b>{picture.gflops:.4g} GFLOPs</b> · <b>{picture.ms:.0f} ms</b></div>'
