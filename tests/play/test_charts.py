"""Drawings as SVG: well-formed, labelled, and at the right places."""

from xml.etree import ElementTree

import pytest

from elit.play.charts import Axis, Mark, bar_chart, lines_chart, plane_chart, schedule_chart


def parts(drawing: str, kind: str):
    root = ElementTree.fromstring(drawing)
    assert root.get("role") == "img"
    assert root.get("aria-label")
    return [each for each in root.iter() if kind in (each.get("class") or "").split()]


def test_an_axis_has_round_ticks():
    assert Axis(0, 16, "").ticks() == [0, 5, 10, 15]
    assert Axis(0.8, 30, "", logarithmic=True).ticks() == pytest.approx([1, 2, 5, 10, 20])
    assert Axis.over([1, 100], "").place(100) > Axis.over([1, 100], "").place(10) > 0.4
    assert not Axis.over([-1, 100], "").logarithmic


def test_a_schedule_is_a_stepped_line_with_its_knots():
    drawing = schedule_chart([(0, 0.5, 4), (0.5, 1, 16)], 16)
    (line,) = parts(drawing, "line")
    assert len(line.get("points").split()) == 4
    assert len(parts(drawing, "knot")) == 2


def test_the_plane_marks_front_and_present():
    marks = [Mark(1, 9, "a", front=True), Mark(2, 5, "b <i>", front=True), Mark(2, 7, "c")]
    drawing = plane_chart(marks, "fd", "GFLOPs", (1.5, None), "lower")
    assert (len(parts(drawing, "front")), len(parts(drawing, "point"))) == (2, 1)
    assert parts(drawing, "present")[0].tag == "line"
    assert parts(plane_chart(marks, "fd", "GFLOPs", (1.5, 6.0), "lower"), "present")[0].tag == "circle"
    heights = [float(each.get("cy")) for each in parts(drawing, "front")]
    assert max(heights) - min(heights) > 50  # 5 and 9 are far apart


def test_bars_and_lines():
    assert len(parts(bar_chart([("1", 0.2), ("2", 0.0)], "share", "title"), "bar")) == 2
    drawing = lines_chart([0, 1, 2], [("queue", [0, 3, None]), ("<b>", [None] * 3)], "requests", "load")
    assert len(parts(drawing, "line")) == 1
    assert lines_chart([], [("queue", [])], "requests", "load")
