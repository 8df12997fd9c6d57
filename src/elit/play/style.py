"""How the page looks: no font, script or picture of another host; light and dark; one column on a phone."""

from html import escape
from typing import Any

FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONOSPACED = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")

CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
.head h1 { font-size: 1.5rem; margin: 0; font-weight: 650; }
.head p { margin: .15rem 0 0; color: var(--body-text-color-subdued); }
.picture img, .frames img, .thumbnails img { image-rendering: pixelated; }
.picture img { width: 100%; height: 100%; object-fit: contain; }
.facts { font-variant-numeric: tabular-nums; line-height: 1.5; }
.facts b { font-weight: 650; }
.facts .quiet { color: var(--body-text-color-subdued); }
.facts .wrong { color: var(--error-text-color, #b91c1c); font-weight: 600; }
.facts table { border-collapse: collapse; width: 100%; }
.facts td, .facts th { padding: .2rem .6rem .2rem 0 !important; text-align: left; border: 0 !important; }
.thumbnails, .frames { height: auto !important; min-height: 0 !important; }
.thumbnails .grid-wrap, .frames .grid-wrap { height: auto !important; min-height: 0 !important; max-height: none; }
.thumbnails .grid-container { grid-template-columns: repeat(5, minmax(0, 1fr)) !important; }
.frames .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)) !important; }
.thumbnails .caption-label, .frames .caption-label { font-size: .7rem; padding: 0 .25rem; }
.examples { gap: .4rem !important; } .examples button { padding-inline: .3rem; }
.meter { height: .45rem; border-radius: 99px; background: var(--border-color-primary); overflow: hidden; }
.meter i { display: block; height: 100%; background: var(--color-accent); }
.chart { width: 100%; height: auto; display: block; }
.chart .grid { stroke: var(--border-color-primary); stroke-width: 1; }
.chart text { fill: var(--body-text-color-subdued); font-size: 13px; }
.chart .label { font-size: 13px; }
.chart .line { fill: none; stroke: var(--color-accent); stroke-width: 2.5; }
.chart .area { fill: var(--color-accent); opacity: .14; }
.chart .knot, .chart .front { fill: var(--color-accent); }
.chart .point { fill: var(--body-text-color-subdued); opacity: .5; }
.chart circle.present { fill: none; stroke: #e11d48; stroke-width: 3.5; }
.chart line.present { stroke: #e11d48; stroke-width: 2; stroke-dasharray: 6 4; }
.chart .bar { fill: var(--color-accent); }
.chart .dot { fill: var(--color-accent); stroke: none !important; }
.chart .dot.series-1 { fill: #0d9488; } .chart .dot.series-2 { fill: #b45309; }
.chart .series-1 { stroke: #0d9488; } .chart text.series-1 { fill: #0d9488; stroke: none; }
.chart .series-2 { stroke: #b45309; } .chart text.series-2 { fill: #b45309; stroke: none; }
.chart text.series-0 { fill: var(--color-accent); stroke: none; }
@media (max-width: 767px) {
  .sides { flex-direction: column-reverse !important; }
  .sides > .column { min-width: 0 !important; width: 100%; }
  .frames .grid-container { grid-template-columns: repeat(3, minmax(0, 1fr)) !important; }
  .chart text { font-size: 20px; }
}
"""


def theme() -> Any:
    """Gradio's default theme with fonts of the visitor's own machine."""
    import gradio as gr

    return gr.themes.Default(primary_hue="indigo", font=list(FONTS), font_mono=list(MONOSPACED))


def wrong(message: str) -> str:
    return f'<div class="facts"><span class="wrong">{escape(message)}</span></div>'


def quiet(message: str) -> str:
    return f'<div class="facts"><span class="quiet">{escape(message)}</span></div>'
