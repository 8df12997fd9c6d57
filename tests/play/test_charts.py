"""Charts as SVG: well-formed, labelled, marks at the right places."""

from xml.etree import ElementTree

import pytest

from elit.play.charts import Axis, lines_chart, plane_chart


def parts(chart: str, kind: str):
    root = ElementTree.fromstring(chart)
    assert root.get("role") == "img"
    assert root.get("aria-label")
    return [each for each in root.iter() if kind in (each.get("class") or "").split()]


def test_an_axis_has_round_ticks():
    assert Axis(0, 16, "").ticks() == [0, 5, 10, 15]
    assert Axis(0.8, 30, "", logarithmic=True).ticks() == pytest.approx([1, 2, 5, 10, 20])
    assert Axis.over([1, 100], "").position(100) > Axis.over([1, 100], "").position(10) > 0.4
    assert not Axis.over([-1, 100], "").logarithmic


def test_the_plane_marks_front_and_present():
    points, front, labels = [(1, 9, "a"), (2, 7, "c"), (2, 5, "b <i>")], [0, 2], ("GFLOPs", "fd")
    chart = plane_chart(points, front, labels, (1.5, None))
    assert (len(parts(chart, "front")), len(parts(chart, "point"))) == (2, 1)
    assert parts(chart, "present")[0].tag == "polyline"
    assert parts(plane_chart(points, front, labels, (1.5, 6.0)), "present")[0].tag == "circle"
    heights = [float(each.get("cy")) for each in parts(chart, "front")]
    assert max(heights) - min(heights) > 50  # 5 and 9 are far apart


def test_lines():
    schedule = [(0.0, 4.0), (0.5, 4.0), (0.5, 16.0), (1.0, 16.0)]
    (line,) = parts(lines_chart({"latents": schedule}, "t", "", "Budget over time", 16), "line")
    assert len(line.get("points").split()) == 4
    chart = lines_chart({"queue": [(0, 0), (1, 3)], "<b>": []}, "seconds", "requests", "load")
    assert len(parts(chart, "series-0")) == 4  # the line, two dots, the name
    assert lines_chart({"queue": []}, "seconds", "requests", "load")
