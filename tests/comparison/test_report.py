"""The files of a report: what they hold, and that the page needs no network."""

from __future__ import annotations

import csv
import io
import re
import sys
from html.parser import HTMLParser

import pytest
from rich.console import Console

from lit_ft.compare import main
from lit_ft.comparison import files, pictures
from lit_ft.comparison.comparison import compare
from lit_ft.comparison.runs import gather
from lit_ft.comparison.text import terminal_table
from lit_ft.storage.json_file import read_json
from tests.support.summaries import write_many, write_run

ENDINGS = ("html", "md", "csv", "json")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Write the report of fourteen methods with long names."""
    folder = write_many(tmp_path_factory.mktemp("many"))
    main([str(folder)])
    return folder


def printed(folder, width, monkeypatch):
    """Return the table of a comparison as a terminal of `width` columns shows it."""
    monkeypatch.setenv("COLUMNS", str(width))
    terminal = Console(width=width, file=io.StringIO())
    terminal.print(terminal_table(compare(*gather([folder]))))
    return terminal.file.getvalue()


class Page(HTMLParser):
    """Collects what a page would load, and its texts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.loads, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "data")]

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_needs_no_network_no_script_and_little_space(many):
    text = (many / "report.html").read_text()
    page = Page(text)
    assert page.loads == []
    assert not {"script", "link", "iframe", "img", "object", "embed"} & set(page.tags)
    assert not re.search(r"url\((?!#)|@import", text)
    names = re.findall(r"https?://[^\s\"'<]+", text)
    assert set(names) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert len(text) < 200_000


def test_the_page_has_four_pictures_with_texts_of_a_size_to_read(many):
    text = (many / "report.html").read_text()
    drawings = re.findall(r"<figure.*?</figure>", text, re.DOTALL)
    assert [re.search("<h3>(.*?)</h3>", one)[1] for one in drawings] == [
        "Loss by tokens",
        "Loss by time",
        "Peak memory against loss",
        "Planned memory by use",
    ]
    assert all('<svg role="img" aria-label=' in one for one in drawings)
    sizes = [float(size) for size in re.findall(r'font-size="?:? ?([\d.]+)px', text)]
    assert len(sizes) > 30 and min(sizes) >= 13
    # A phone of 420 pixels shows the drawing at this share of its width.
    widths = [float(w) for w in re.findall(r'<svg role="img"[^>]* width="(\d+)"', text)]
    assert len(widths) == 4 and min(sizes) * min(1.0, 388 / max(widths)) >= 11


def test_all_rows_and_runs_are_in_all_files(many):
    html, md, table, _ = ((many / f"report.{one}").read_text() for one in ENDINGS)
    told = read_json(many / "report.json")
    assert len(told["rows"]) == 14 and len(told["without_result"]) == 3
    page = " ".join(Page(html).texts)
    for row in told["rows"]:
        assert row["settings"] in page
        assert row["settings"].replace("_", "\\_") in md
        for run in row["trials"][0]["runs"]:
            assert f"python train.py {' '.join(run['arguments'])}" in md
    for reason in ("out of memory at step 3", "it was killed", "is damaged"):
        assert reason in page and reason in md and reason in table
    lines = list(csv.DictReader(table.splitlines()))
    assert [line["status"] for line in lines] == [
        *["completed"] * 14,
        "damaged",
        "out of memory",
        "interrupted",
    ]
    assert float(lines[0]["val_loss"]) == pytest.approx(told["rows"][0]["trials"][0]["val_loss"])


def test_a_column_that_no_run_fills_is_left_out(many, tmp_path):
    assert "| forgetting |" not in (many / "report.md").read_text()
    write_run(tmp_path / "0", forgetting=0.125, disk_bytes={"checkpoints": 4096, "export": 1024})
    main([str(tmp_path)])
    text = (tmp_path / "report.md").read_text()
    assert "forgetting" in text and "| 0.1250 |" in text and "| 4 KiB | 1 KiB |" in text


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_in_a_terminal_cuts_no_value(width, tmp_path, monkeypatch):
    for number, rank in enumerate((1, 128)):
        write_run(
            tmp_path / str(number), f"galore.rank={rank}", "optim=adamw_8bit", loss=1.5 + rank
        )
    shown = printed(tmp_path, width, monkeypatch)
    assert {"galore.rank=1", "galore.rank=128", "1", "2", "2.5000", "129.5000"} <= set(
        shown.split()
    )


def test_a_word_that_is_too_wide_is_broken_and_not_cut(tmp_path, monkeypatch):
    for number, ending in enumerate(("clean", "all")):
        path = f"/home/somebody/projects/customer_support/tickets/{ending}.jsonl"
        write_run(tmp_path / str(number), f"data.path={path}", loss=1.5 + number)
    shown = printed(tmp_path, 80, monkeypatch)
    assert "clean" in shown and "/all.jsonl" in shown
    assert {"1.5000", "2.5000"} <= set(shown.split())


def test_texts_of_runs_are_no_markup(tmp_path, capsys):
    write_run(tmp_path / "0", "data.path=<script>alert(1)</script>|[x](y)", loss=1.0)
    write_run(tmp_path / "1", "data.path=b", loss=2.0)
    write_run(tmp_path / "2", loss=None, status="failed", ended="<b>no</b> | \x1b[31m")
    main([str(tmp_path), "--output", str(tmp_path / "out")])
    assert "\x1b[31m" not in capsys.readouterr().out
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert "script" not in page.tags and "<script>" in "".join(page.texts)
    text = (tmp_path / "out" / "report.md").read_text()
    assert r"\<script\>alert(1)\</script\>\|\[x\](y)" in text
    assert not (tmp_path / "report.md").exists()


def test_without_the_libraries_that_draw_the_rest_is_written(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "0")
    monkeypatch.setattr(pictures, "find_spec", lambda _: None)
    monkeypatch.setitem(sys.modules, "altair", None)
    main([str(tmp_path)])
    assert all((tmp_path / f"report.{ending}").is_file() for ending in ENDINGS)
    page = (tmp_path / "report.html").read_text()
    assert "<svg" not in page and "pip install altair vl-convert-python" in page
    assert "pip install altair vl-convert-python" in capsys.readouterr().out


def test_a_picture_without_figures_says_so(tmp_path):
    write_run(tmp_path / "0", history=None, peak_bytes=None)
    main([str(tmp_path)])
    page = (tmp_path / "report.html").read_text()
    assert "<svg" not in page
    assert "no history of their losses" in page and "no measured peak" in page


def test_runs_without_any_result_have_a_report(tmp_path, capsys):
    write_run(tmp_path / "0", loss=None, status="failed", ended="ValueError before the first step")
    main([str(tmp_path)])
    assert "failed: ValueError before the first step" in capsys.readouterr().out
    assert "No run has a result to compare" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("missing", "missing does not exist: name the folder of a run or of a sweep"),
        ("file", "file is not a folder"),
        ("empty", "empty holds no run: neither it nor a folder in it has a summary.json"),
    ],
)
def test_a_folder_without_runs_is_named_with_the_remedy(tmp_path, name, told):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "good")
    with pytest.raises(SystemExit, match=f"^{re.escape(str(tmp_path))}/{re.escape(told)}"):
        main([str(tmp_path / "good"), str(tmp_path / name)])
    assert not (tmp_path / "good" / "report.html").exists()


def test_the_report_is_not_taken_for_a_run(tmp_path):
    write_run(tmp_path / "0")
    main([str(tmp_path)])
    first = [(tmp_path / f"{files.NAME}.{ending}").read_bytes() for ending in ENDINGS]
    main([str(tmp_path)])
    assert [(tmp_path / f"{files.NAME}.{ending}").read_bytes() for ending in ENDINGS] == first
