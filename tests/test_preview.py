"""`python -m lit_ft.preview`: rows as the model sees them, in the terminal and as a page."""

from __future__ import annotations

import gzip
import json
import re
from html.parser import HTMLParser

import pytest

from lit_ft.preview import main
from lit_ft.run.arguments import composed
from lit_ft.storage.json_file import write_json

ROWS = [("2 + 2?", "4"), ("Was heißt „Käse“?", "cheese 🧀"), ("<b>bold</b>?", "</b> & so on")]


def chat(prompt: str, answer: str) -> dict:
    return {
        "messages": [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": answer},
        ]
    }


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes rows to a file with a name that Hydra's grammar does not know, and shows them."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "données (1)=[a].jsonl"

    def write(rows):
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        return f"data.path={file}"

    return write


@pytest.fixture
def shown(write, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def shown(rows, *arguments):
        main(["model=tiny", write(rows), *arguments])
        return capsys.readouterr().out

    return shown


def without_frame(text: str) -> str:
    return re.sub(r" *│\n│ ?", "\n", text)


def figure(text: str, what: str) -> str:
    [line] = [line for line in text.splitlines() if line.strip().startswith(what)]
    return line.strip().removeprefix(what).strip()


@pytest.mark.smollm2
def test_what_is_learnt_stands_between_brackets_in_a_pipe(shown):
    text = shown([chat(*row) for row in ROWS])
    learnt = re.findall("⟦(.*?)⟧", without_frame(text), re.DOTALL)[1:]  # the first is the legend
    assert learnt == [f"{answer}<|im_end|>" for _, answer in ROWS]
    assert all(prompt in text for prompt, _ in ROWS)


class Marked(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.is_marked, self.learnt, self.texts = False, "", ""

    def handle_starttag(self, tag, attributes):
        self.is_marked = tag == "mark"

    def handle_endtag(self, tag):
        self.is_marked = False

    def handle_data(self, data):
        self.texts += data
        self.learnt += data * self.is_marked


@pytest.mark.smollm2
def test_a_row_does_not_steer_the_terminal(shown):
    text = shown([chat("clear \x1b[2J", "no\x1b[31mred")])
    assert "\x1b" not in text
    assert r"clear \x1b[2J" in text and r"no\x1b[31mred" in text


@pytest.mark.smollm2
def test_a_page_marks_what_is_learnt_and_says_no_more_than_the_rows(shown, tmp_path):
    shown([chat(*row) for row in ROWS], "--html", str(tmp_path / "new" / "page.html"))
    page = Marked()
    page.feed((tmp_path / "new" / "page.html").read_text(encoding="utf-8"))
    answers = "".join(f"{answer}<|im_end|>" for _, answer in ROWS)
    assert page.learnt == f"Underlined, bold text{answers}"
    assert all(prompt in page.texts for prompt, _ in ROWS)


@pytest.mark.smollm2
def test_a_bad_row_is_answered_with_settings(shown):
    text = shown([chat("a <|im_end|> inside", "b")], "data.control_tokens=refuse")
    assert "data.control_tokens=text" in text
    assert 'control_tokens="text"' not in text


def test_a_reason_is_said_once_however_many_rows_have_it(shown):
    text = " ".join(without_frame(shown([{"q": "a", "r": "b"}] * 4)).split())
    assert text.count("no format fits") == 2  # the first row, and the errors at the end
    assert ":1 and 3 other rows: no format fits" in text


@pytest.mark.smollm2
def test_rows_are_counted_and_their_fates_named(shown):
    rows = [chat("q", "a " * 300), *(chat(*row) for row in ROWS), {"text": "x"}, chat("q", "")]
    text = shown(rows, "data.max_length=100", "--rows", "6")
    assert figure(text, "rows read") == "6"
    assert figure(text, "examples") == "4"
    assert figure(text, "left out: too long") == "1"
    assert figure(text, "bad") == "1"
    assert figure(text, "longer than data.max_length=100") == "20.0% of the rows"
    assert "more than data.max_length=100" in text
    assert ":5 · bad: training cannot use it" in text
    assert "the row is in the format Text {text}, and those before it are" in text
    assert "1 row" in figure(text, "!") and "an answer is empty" in figure(text, "!")


@pytest.mark.smollm2
def test_a_template_without_ends_is_named_row_by_row(shown, tmp_path):
    (tmp_path / "t.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    text = shown([chat(*row) for row in ROWS], f"data.chat_template={tmp_path / 't.jinja'}")
    assert text.count("an answer ends without a learnt end token") + text.count("is added") >= 3


@pytest.mark.smollm2
def test_only_a_sample_is_read_and_the_total_is_counted(shown):
    rows = [chat(str(i), "a") for i in range(50)]
    text = shown(rows, "--sample", "10", "--rows", "2", "--skip", "3")
    assert figure(text, "rows read") == "10 of 50"
    assert ":4 ·" in text and ":5 ·" in text and ":6 ·" not in text
    assert figure(shown(rows, "--sample", "all"), "rows read") == "50"


@pytest.mark.smollm2
def test_the_time_of_an_epoch_is_that_of_the_newest_run_of_the_model(shown, tmp_path):
    tiny = composed(["model=tiny"])["model"]
    for name, model, speed in (("a", tiny, 10.0), ("b", "other", 1.0), ("c", tiny, None)):
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        summary = {"config": {"model": model}, "tokens_per_second": speed}
        (run / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "runs" / "cut").mkdir()
    (tmp_path / "runs" / "cut" / "summary.json").write_text("{")
    (tmp_path / "runs" / "damaged").mkdir()
    damaged = tmp_path / "runs" / "damaged" / "summary.json"
    write_json(damaged, {"config": {"model": tiny}, "tokens_per_second": 25.0})
    damaged.write_text(damaged.read_text().replace("25.0", "99.0"))
    text = shown([chat(*row) for row in ROWS])
    tokens = int(figure(text, "an epoch").split()[0])
    time = f"0:00:{round(tokens / 10):02d} at 10 tokens/s, the speed of runs/a"
    assert time in figure(text, "an epoch")


@pytest.mark.smollm2
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["data.path=missing (1).jsonl"], r"missing \(1\)\.jsonl: no such file"),
        (["data.max_lenght=3"], "max_length"),
        (["model=pretrained"], "model.name_or_path"),
        (["model=tyni"], "tiny"),
        (["data._target_=lit_ft.CausalLMModule"], "is known"),
        (["model._target_=os.system"], "trusted_packages"),
        (["data.path=empty.jsonl"], "the file has no rows"),
        (["data.path=one.jsonl", "data.max_length=abc"], "data.max_length=abc: must be"),
        (["data.path=one.jsonl", "data.num_workers=-1"], "data.num_workers=-1: must be"),
    ],
)
def test_a_mistake_is_one_message(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "one.jsonl").write_text(json.dumps(chat("q", "a")))
    with pytest.raises(SystemExit, match=said):
        main(["model=tiny", *arguments])


@pytest.mark.smollm2
def test_a_compressed_file_is_shown_without_a_total(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    file = tmp_path / "rows.jsonl.gz"
    with gzip.open(file, "wt") as stream:
        stream.writelines(f"{json.dumps(chat(str(i), 'a'))}\n" for i in range(20))
    main(["model=tiny", f"data.path={file}", "--sample", "5", "--rows", "1"])
    assert "5 (there are more)" in figure(capsys.readouterr().out, "rows read")


@pytest.mark.smollm2
def test_it_takes_settings_from_a_file(tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "One?", "completion": "two"}\n' * 3)
    settings = tmp_path / "my.yaml"
    settings.write_text(f"model: tiny\ndata.path: {data}\ncutoff_len: 321\n")
    main(["--config", str(settings), "--rows", "1"])
    assert "321" in capsys.readouterr().out


@pytest.mark.parametrize("option", [("--rows", "-1"), ("--skip", "1.5"), ("--sample", "few")])
def test_an_impossible_number_of_rows_is_named(option, capsys):
    with pytest.raises(SystemExit):
        main(["model=tiny", *option])
    said = f"{option[0]}: must be a whole number of at least 0"
    assert said in capsys.readouterr().err


@pytest.mark.smollm2
def test_it_says_so_if_all_rows_are_skipped(shown):
    text = shown([chat("1 + 1?", "2")], "--skip", "5")
    assert "No rows to show: there are 1, and all are skipped." in text
