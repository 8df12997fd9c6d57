"""Line charts of the page as SVG text: they scale to a phone, follow light and dark, and load nothing."""

from collections.abc import Mapping, Sequence
from html import escape

from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 640, 190
LEFT, RIGHT, TOP, BOTTOM = 62, 624, 14, 144
Points = Sequence[tuple[float, float]]


def lines_chart(lines: Mapping[str, Points], x: str, y: str, title: str, highest: float = 0.0) -> str:
    """Lines over an axis from 0, each with its name, every point with its value as a title.

    x, y: labels of the axes. title: for screen readers. highest: the axis of y reaches at least so far.
    """
    points = [point for each in lines.values() for point in each] or [(0.0, 0.0)]
    start, end = min(points)[0], max(points)[0]
    end = end if end > start else start + 1
    top = (1.1 + 0.2 * len(lines)) * (max([highest, *(value for _, value in points)]) or 1.0)  # the names are above
    marks: list[str] = []

    def place(at: float, value: float) -> tuple[float, float]:
        return round(LEFT + (at - start) / (end - start) * (RIGHT - LEFT), 1), round(
            BOTTOM - value / top * (BOTTOM - TOP), 1
        )

    def text(across: float, down: float, content: str, kind: str = "", anchor: str = "middle", turn: str = "") -> None:
        marks.append(
            f'<text class="{kind}" text-anchor="{anchor}" x="{across}" y="{down}" {turn}>{escape(content)}</text>'
        )

    locator = MaxNLocator(5, steps=[1, 2, 5, 10])
    for value in (each for each in locator.tick_values(0, top) if each <= top):
        _, down = place(start, value)
        marks.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{down}" y2="{down}"/>')
        text(LEFT - 7, down + 4, f"{value:g}", anchor="end")
    for at in (each for each in locator.tick_values(start, end) if start <= each <= end):
        text(place(at, 0)[0], BOTTOM + 17, f"{at:g}")
    text((LEFT + RIGHT) / 2, HEIGHT - 7, x)
    text(13, 79, y, turn='transform="rotate(-90 13 79)"')
    for number, (name, each) in enumerate(lines.items()):
        path = " ".join("{},{}".format(*place(*point)) for point in each)
        marks.append(f'<polyline class="series-{number}" points="{path}"/>')
        for at, value in each:
            across, down = place(at, value)
            words = f"<title>{escape(name)}: {value:.4g}</title>"
            marks.append(f'<circle class="series-{number}" cx="{across}" cy="{down}" r="2">{words}</circle>')
        text(LEFT + 8, TOP + 14 + 20 * number, name, f"series-{number}", "start")
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}"'
    return f'<svg class="chart" {size} role="img" aria-label="{escape(title)}">{"".join(marks)}</svg>'
