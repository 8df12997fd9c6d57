"""Drawings of the page as SVG text: they scale to a phone, follow light and dark, and load nothing.

Colours are classes of `style.py`. Every drawing has a label that a screen reader says, and every mark a title.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 640
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 14, 46
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """Numbers along one side of a drawing."""

    low: float
    high: float
    label: str
    logarithmic: bool = False

    @classmethod
    def over(cls, values: Sequence[float], label: str) -> "Axis":
        """Holds all of `values` with a little room; logarithmic where all are above 0 and spread over a factor of 4."""
        low, high = min(values), max(values)
        if low > 0 and high > 4 * low:
            return cls(low / 1.15, high * 1.15, label, logarithmic=True)
        room = 0.06 * ((high - low) or abs(high) or 1.0)
        return cls(low - room, high + room, label)

    def place(self, value: float) -> float:
        """0 at `low`, 1 at `high`."""
        low, high, value = (math.log(each) if self.logarithmic else each for each in (self.low, self.high, value))
        return 0.5 if high == low else (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Some round numbers inside: 1, 2 or 5 times a power of ten."""
        if self.logarithmic:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            every = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
            return [value for value in every if self.low <= value <= self.high]
        rough = (self.high - self.low) / 5
        if rough <= 0:
            return [self.low]
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


@dataclass(frozen=True)
class Canvas:
    """Two axes and the marks between them; x None has no numbers, as below bars."""

    x: Axis | None
    y: Axis
    height: int = 300

    @property
    def bottom(self) -> int:
        return self.height - BOTTOM

    def across(self, value: float) -> float:
        return round(LEFT + (self.x.place(value) if self.x else value) * (WIDTH - LEFT - RIGHT), 1)

    def up(self, value: float) -> float:
        return round(self.bottom - self.y.place(value) * (self.bottom - TOP), 1)

    def line(self, points: Points, kind: str = "line") -> str:
        return f'<polyline class="{kind}" points="{self._path(points)}"/>'

    def area(self, points: Points) -> str:
        ends = [(points[0][0], self.y.low), *points, (points[-1][0], self.y.low)]
        return f'<polygon class="area" points="{self._path(ends)}"/>'

    def dot(self, x: float, y: float, kind: str, words: str, radius: int = 4) -> str:
        return f'<circle class="{kind}" cx="{self.across(x)}" cy="{self.up(y)}" r="{radius}">{_title(words)}</circle>'

    def upright(self, x: float, kind: str, words: str) -> str:
        at = self.across(x)
        return f'<line class="{kind}" x1="{at}" x2="{at}" y1="{TOP}" y2="{self.bottom}">{_title(words)}</line>'

    def text(self, x: float, y: float, words: str, kind: str, anchor: str = "middle") -> str:
        return f'<text class="{kind}" text-anchor="{anchor}" x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'

    def draw(self, marks: Sequence[str], title: str) -> str:
        """The whole drawing, axes beneath the marks."""
        parts = []
        for value in self.y.ticks():
            at = self.up(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
            parts.append(self.text(LEFT - 7, at + 4, f"{value:g}", "tick", "end"))
        if self.x is not None:
            for value in self.x.ticks():
                parts.append(self.text(self.across(value), self.bottom + 17, f"{value:g}", "tick"))
            parts.append(self.text((LEFT + WIDTH - RIGHT) / 2, self.height - 7, self.x.label, "label"))
        middle = (TOP + self.bottom) / 2
        side = self.text(13, middle, self.y.label, "label")
        parts.append(f'<g transform="rotate(-90 13 {middle})">{side}</g>')
        return (
            f'<svg class="chart" viewBox="0 0 {WIDTH} {self.height}" role="img" aria-label="{escape(title)}">'
            f"{''.join(parts)}{''.join(marks)}</svg>"
        )

    def _path(self, points: Points) -> str:
        return " ".join(f"{self.across(x)},{self.up(y)}" for x, y in points)


def schedule_chart(pieces: Sequence[tuple[float, float, int]], most: int) -> str:
    """Latents of a group over t: pieces (from t, to t, latents) as a stepped line, its knots marked."""
    canvas = Canvas(Axis(0, 1, "t: 0 is noise, 1 is the picture"), Axis(0, most, "latents a group"), height=190)
    points = [point for low, high, count in pieces for point in ((low, float(count)), (high, float(count)))]
    marks = [canvas.area(points), canvas.line(points)]
    for (_, high, before), (_, _, after) in itertools.pairwise(pieces):
        marks += [canvas.dot(high, count, "knot", f"{count} latents at t = {high:g}") for count in (before, after)]
    words = ", then ".join(f"{latents} of {most} latents to t = {high:g}" for _, high, latents in pieces)
    return canvas.draw(marks, f"Budget over time: {words}")


@dataclass(frozen=True)
class Mark:
    """A measured setting in the compute–quality plane."""

    cost: float
    quality: float
    words: str
    front: bool = False


def plane_chart(
    points: Sequence[Mark], metric: str, cost: str, present: tuple[float, float | None] | None, better: str
) -> str:
    """Measured settings, the Pareto front as a line, and where the present setting lies.

    cost: what the horizontal axis is, with its unit. present: its cost, and its quality where that is known; a
    vertical line marks one whose quality nobody measured. better: "lower" or "higher".
    """
    here = [present[0]] if present else []
    costs = [point.cost for point in points] + here
    qualities = [point.quality for point in points] + ([present[1]] if present and present[1] is not None else [])
    canvas = Canvas(Axis.over(costs, cost), Axis.over(qualities, f"{metric} ({better} is better)"))
    front = sorted((point.cost, point.quality) for point in points if point.front)
    marks = [canvas.line(front)] if len(front) > 1 else []
    for point in sorted(points, key=lambda point: point.front):
        marks.append(canvas.dot(point.cost, point.quality, "front" if point.front else "point", point.words))
    if present and present[1] is None:
        marks.append(canvas.upright(present[0], "present", "the present setting; its quality was not measured"))
    elif present:
        marks.append(canvas.dot(present[0], present[1] or 0.0, "present", "the present setting", radius=7))
    return canvas.draw(marks, f"{metric} against {cost}: {len(points)} measured settings, {len(front)} on the front")


def bar_chart(values: Sequence[tuple[str, float]], label: str, title: str) -> str:
    """A bar a value above 0, its name below it."""
    canvas = Canvas(None, Axis(0, max([value for _, value in values] + [1e-12]) * 1.05, label), height=230)
    marks = []
    for i, (name, value) in enumerate(values):
        left, right = canvas.across((i + 0.12) / len(values)), canvas.across((i + 0.88) / len(values))
        top = canvas.up(max(0.0, value))
        marks.append(
            f'<rect class="bar" x="{left}" y="{top}" width="{right - left:.1f}" height="{canvas.bottom - top:.1f}">'
            f"{_title(f'{name}: {value:.3g}')}</rect>"
        )
        marks.append(canvas.text((left + right) / 2, canvas.bottom + 17, name, "tick"))
    return canvas.draw(marks, title)


def lines_chart(
    seconds: Sequence[float], lines: Sequence[tuple[str, Sequence[float | None]]], label: str, title: str
) -> str:
    """Lines over time, each with its name; None leaves out a point."""
    start, end = (min(seconds), max(seconds)) if seconds else (0.0, 0.0)
    most = max([value for _, values in lines for value in values if value is not None] + [1.0])
    canvas = Canvas(
        Axis(start, max(end, start + 1), "seconds; 0 is now"),
        Axis(0, (1.1 + 0.2 * len(lines)) * most, label),
        height=190,
    )
    marks = []
    for number, (name, values) in enumerate(lines):
        points = [(at, value) for at, value in zip(seconds, values, strict=True) if value is not None]
        if points:
            marks.append(canvas.line(points, f"line series-{number}"))
            marks += [canvas.dot(*point, f"dot series-{number}", f"{name}: {point[1]:.4g}", 2) for point in points]
        marks.append(canvas.text(LEFT + 8, TOP + 14 + 20 * number, name, f"legend series-{number}", "start"))
    return canvas.draw(marks, title)


def _title(words: str) -> str:
    return f"<title>{escape(words)}</title>"
