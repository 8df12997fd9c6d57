"""Charts as SVG: well-formed, labelled, marks at the right places."""

from xml.etree import ElementTree

from elit.play.charts import lines_chart


def test_lines():
    lines = {"queue": [(0.0, 0.0), (1.0, 3.0)], "<b>": []}
    root = ElementTree.fromstring(lines_chart(lines, "seconds", "requests", "load"))
    assert (root.get("role"), root.get("aria-label")) == ("img", "load")
    marks = [each for each in root.iter() if each.get("class") == "series-0"]
    assert len(marks) == 4  # the line, two dots, the name
    (_, low), (_, high) = (point.split(",") for point in marks[0].get("points").split())
    assert (float(low), 40 < float(high) < 100) == (144.0, True)
    ticks = [each.text for each in root.iter() if each.tag == "text"]
    assert ticks[:5] == ["0", "1", "2", "3", "4"]
    assert ElementTree.fromstring(lines_chart({"queue": []}, "seconds", "requests", "load")) is not None
