"""Charts of the page as SVG text: they scale to a phone, follow light and dark, and load nothing.

Colours are classes of `style.py`. Every chart has a label for screen readers, and every mark a title.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from matplotlib.ticker import LogLocator, MaxNLocator

WIDTH = 640
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 14, 46
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """Numbers along one side of a chart."""

    low: float
    high: float
    label: str
    logarithmic: bool = False

    @classmethod
    def over(cls, values: Sequence[float], label: str) -> "Axis":
        """An axis with a little room around `values`, logarithmic where they spread over a factor of 4."""
        low, high = min(values), max(values)
        if low > 0 and high > 4 * low:
            return cls(low / 1.15, high * 1.15, label, logarithmic=True)
        room = 0.06 * ((high - low) or abs(high) or 1.0)
        return cls(low - room, high + room, label)

    def position(self, value: float) -> float:
        """0 at `low`, 1 at `high`."""
        low, high, value = (math.log(each) if self.logarithmic else each for each in (self.low, self.high, value))
        return (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round numbers inside: 1, 2 or 5 times a power of ten."""
        locator = LogLocator(subs=(1, 2, 5)) if self.logarithmic else MaxNLocator(5, steps=[1, 2, 5, 10])
        return [float(value) for value in locator.tick_values(self.low, self.high) if self.low <= value <= self.high]


class Chart:
    """Two axes and the marks between them."""

    def __init__(self, x: Axis, y: Axis, height: int):
        self.x, self.y, self.height, self.bottom = x, y, height, height - BOTTOM
        self.marks: list[str] = []
        for value in y.ticks():
            at = self.up(value)
            self.marks.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
            self.text(LEFT - 7, at + 4, f"{value:g}", "tick", "end")
        for value in x.ticks():
            self.text(self.across(value), self.bottom + 17, f"{value:g}", "tick")
        middle = (TOP + self.bottom) / 2
        self.text((LEFT + WIDTH - RIGHT) / 2, height - 7, x.label, "label")
        self.text(13, middle, y.label, "label", turn=f'transform="rotate(-90 13 {middle})"')

    def across(self, value: float) -> float:
        return round(LEFT + self.x.position(value) * (WIDTH - LEFT - RIGHT), 1)

    def up(self, value: float) -> float:
        return round(self.bottom - self.y.position(value) * (self.bottom - TOP), 1)

    def line(self, points: Points, kind: str = "") -> None:
        path = " ".join(f"{self.across(x)},{self.up(y)}" for x, y in points)
        self.marks.append(f'<polyline class="line {kind}" points="{path}"/>')

    def dot(self, x: float, y: float, kind: str, title: str, radius: int = 4) -> None:
        at = f'cx="{self.across(x)}" cy="{self.up(y)}" r="{radius}"'
        self.marks.append(f'<circle class="{kind}" {at}><title>{escape(title)}</title></circle>')

    def text(self, x: float, y: float, text: str, kind: str, anchor: str = "middle", turn: str = "") -> None:
        at = f'text-anchor="{anchor}" x="{x:.1f}" y="{y:.1f}" {turn}'
        self.marks.append(f'<text class="{kind}" {at}>{escape(text)}</text>')

    def svg(self, title: str) -> str:
        size = f'viewBox="0 0 {WIDTH} {self.height}"'
        return f'<svg class="chart" {size} role="img" aria-label="{escape(title)}">{"".join(self.marks)}</svg>'


def plane_chart(
    points: Sequence[tuple[float, float, str]],
    front: Sequence[int],
    labels: tuple[str, str],
    present: tuple[float, float | None],
) -> str:
    """The compute–quality plane: measured settings (cost, quality, title) and the present one.

    front: places of the Pareto front among them. labels: of cost and quality. present: a vertical line where the
    quality is not known.
    """
    costs, qualities, _ = zip(*points, (*present, ""), strict=True)
    chart = Chart(
        Axis.over(costs, labels[0]), Axis.over([each for each in qualities if each is not None], labels[1]), 300
    )
    chart.line([points[i][:2] for i in front])
    for i, (cost, quality, title) in enumerate(points):
        chart.dot(cost, quality, "front" if i in front else "point", title)
    if present[1] is None:
        chart.line([(present[0], chart.y.low), (present[0], chart.y.high)], "present")
    else:
        chart.dot(present[0], present[1], "present", "the present setting", radius=7)
    return chart.svg(f"{labels[1]} against {labels[0]}: {len(points)} measured settings, {len(front)} on the front")


def lines_chart(lines: Mapping[str, Points], x: str, y: str, title: str, highest: float = 0.0) -> str:
    """Lines over an axis from 0, each with its name. x, y: labels. highest: the axis reaches at least so far."""
    points = [point for each in lines.values() for point in each] or [(0.0, 0.0)]
    left, right = min(points)[0], max(points)[0]
    top = max([highest, *(value for _, value in points)]) or 1.0
    legend = 0.1 + 0.2 * len(lines)  # above the lines
    chart = Chart(Axis(left, right if right > left else left + 1, x), Axis(0, (1 + legend) * top, y), 190)
    for number, (name, each) in enumerate(lines.items()):
        chart.line(each, f"series-{number}")
        for at, value in each:
            chart.dot(at, value, f"dot series-{number}", f"{name}: {value:.4g}", radius=2)
        chart.text(LEFT + 8, TOP + 14 + 20 * number, name, f"legend series-{number}", "start")
    return chart.svg(title)
