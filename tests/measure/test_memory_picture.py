"""The picture of the memory: bars as high as their bytes, and a page that needs nothing else."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from lit_ft.measure.memory_picture import Limit, Phase, write_picture

GIB = 1 << 30
LOAD = {"weights": 8 * GIB, "temporaries": 0}
STEP = {"weights": 8 * GIB, "optimizer": 4 * GIB, "gradients": 2 * GIB, "temporaries": GIB}


class Drawing(HTMLParser):
    """The bars and lines of a page, and its words."""

    def __init__(self, page):
        super().__init__()
        self.bars, self.line, self.words = [], None, []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if tag == "g" and "transform" not in found:
            self.bars.append({})
        if tag == "rect" and "class" in found:
            self.bars[-1][found["class"]] = (float(found["y"]), float(found["height"]))
        if "stroke-dasharray" in found:
            self.line = float(found["y1"])

    def handle_data(self, data):
        self.words += data.split()


def drawn(tmp_path, phases, **options):
    file = tmp_path / "new" / "picture.html"
    write_picture(file, "Memory", phases, **{"facts": {}, **options})
    page = file.read_text(encoding="utf-8")
    assert not re.search(r"https?:|src=|href=|@import|url\(", page)
    return Drawing(page)


def test_parts_are_as_high_as_their_bytes_and_stand_on_each_other(tmp_path):
    load, step = drawn(tmp_path, [Phase("load", [LOAD]), Phase("step", [STEP])]).bars
    assert set(load) == {"weights"}
    unit = load["weights"][1] / 8
    assert {use: round(height / unit, 2) for use, (_, height) in step.items()} == {
        "weights": 8,
        "optimizer": 4,
        "gradients": 2,
        "temporaries": 1,
    }
    bottoms = [y + height for y, height in step.values()]
    assert bottoms[1:] == pytest.approx([y for y, _ in step.values()][:-1], abs=0.02)


def test_the_line_is_at_the_memory_of_the_device(tmp_path):
    limit = Limit("a <card>", 12 * GIB, (10 * GIB, 11 * GIB))
    page = drawn(tmp_path, [Phase("step", [STEP])], limit=limit)
    [bar] = page.bars
    y, height = bar["weights"]
    assert page.line == pytest.approx(y + height - 12 / 8 * height, abs=0.1)
    assert {"<card>", "12.00"} <= set(page.words)


def test_a_device_far_above_the_bars_does_not_flatten_them(tmp_path):
    limit = Limit("card", 80 * GIB, (70 * GIB, 75 * GIB))
    page = drawn(tmp_path, [Phase("step", [STEP])], limit=limit)
    assert page.line is None
    assert page.bars == drawn(tmp_path, [Phase("step", [STEP])]).bars


def test_each_moment_has_a_bar_and_the_highest_is_told(tmp_path):
    page = drawn(tmp_path, [Phase("backward", [LOAD, STEP, LOAD]), Phase("step", [LOAD])])
    assert [len(bar) for bar in page.bars] == [1, 4, 1, 1]
    assert page.words.count("15.00") == 3  # of the moment, on the axis and in the table


def test_names_without_room_are_left_out_of_the_axis_alone(tmp_path):
    few = drawn(tmp_path, [Phase("forward", [LOAD])] * 7).words.count("forward")
    many = drawn(tmp_path, [Phase("forward", [LOAD])] * 8).words.count("forward")
    assert (few, many) == (7 + 7, 8)
