"""README and docs say what is there: commands compose, code runs, names and files exist."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from transformers import LlamaConfig, LlamaForCausalLM

from lit_ft.data.formats import available, detect
from lit_ft.run.command_line import understood
from lit_ft.run.summary import RunSummary
from tests.support.running import CONF

ROOT = CONF.parent
DOCS = ROOT / "docs"
GENERATED = {DOCS / "api", DOCS / "_generated"}
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
        *sorted(p for p in DOCS.glob("**/*.md") if GENERATED.isdisjoint(p.parents)),
    ]
}
NOT_RUN = "<!-- not run: "
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
SETTING = re.compile(r"~?\+?[a-z][\w./@]*=\S+|~[\w.]+")
# Choices that values belong to: what a line that names such a value is composed with.
FITTING = {
    "adapter.": ["adapter=lora"],
    "callbacks.blocks.": ["update=blocks"],
    "trainer.strategy.": ["strategy=fsdp"],
    "model.": ["model=pretrained", "model.name_or_path=NAME"],
}
# Programs of the shell blocks that are not ours, and not run here.
OTHERS = {"source", "torchrun", "hf", "python3", "docker", "git", "vllm", "cd", "lm_eval"}


def blocks(text: str, language: str) -> list[str]:
    """Return a page's blocks of code, without those that say why they are not run."""
    return [
        match[3]
        for match in FENCE.finditer(text)
        if match[2] == language
        and NOT_RUN not in text[: match.start()].rstrip().rpartition("\n")[2]
    ]


def code_spans(text: str) -> list[str]:
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", FENCE.sub("", text))


def shell_lines(text: str) -> Iterator[str]:
    for block in blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.startswith("#"):
                yield line


def commands(program: str) -> list[str]:
    """Return the commands of all pages that start so, each once."""
    found = [line for text in PAGES.values() for line in shell_lines(text)]
    found += [span for text in PAGES.values() for span in code_spans(text)]
    return sorted({line for line in found if line.startswith(program)})


def table(text: str, *header: str) -> Iterator[list[str]]:
    """Yield the rows of a page's tables whose header starts so."""
    for head, body in re.findall(r"^\| (.*) \|\n\| --- .*\n((?:\|.*\n)*)", text, re.MULTILINE):
        if head.split(" | ")[: len(header)] == list(header):
            for row in re.findall(r"^\| (.*) \|$", body, re.MULTILINE):
                yield [cell.strip() for cell in row.split(" | ")]


@contextmanager
def conf() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def composed(overrides: list[str]) -> DictConfig:
    """Compose, and resolve every value."""
    config = compose("train", overrides)
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    return config


def first_of_a_sweep(argument: str) -> str:
    override = OverridesParser.create().parse_override(argument)
    if not override.is_sweep_override():
        return argument
    value = override.value()
    first = getattr(value, "start", None) or next(override.sweep_string_iterator())
    return f"{override.get_key_element()}={first}"


def arguments_of(command: str) -> list[str]:
    after = command.partition("train.py")[2]
    return [
        first_of_a_sweep(argument)
        for argument in shlex.split(after, comments=True)
        if SETTING.fullmatch(argument)
    ]


def test_every_line_of_the_shell_blocks_is_of_a_known_kind():
    for page, text in PAGES.items():
        for line in shell_lines(text):
            program, *rest = shlex.split(line, comments=True)
            known = program in OTHERS or (program, rest[:1]) in (("pip", ["install"]),)
            known |= program == "make" or (program == "python" and bool(rest))
            assert known, f"{page}: {line}"


def habits() -> list[list[str]]:
    """Return the commands that people type from habit, what they are here, and the outcome."""
    return list(table(PAGES["docs/coming-from.md"], "You type", "Here"))


def own_commands() -> list[str]:
    theirs = {row[0].strip("`") for row in habits()}
    found = [*commands("python train.py"), *commands("torchrun ")]
    return [command for command in found if command not in theirs]


@pytest.mark.parametrize("command", own_commands())
def test_a_command_composes(command):
    with conf():
        composed(arguments_of(command))


def settings_in_lines() -> list[str]:
    """Return the code spans that are settings and nothing else, such as `optim=adamw seed=1`."""
    with conf():
        known = set(compose("train", ["adapter=lora"])) | {p.name for p in CONF.iterdir()}
    found = set()
    for text in PAGES.values():
        for span in code_spans(text.partition("<!-- support matrix: begin")[0]):
            if span.count("'") % 2 or re.match(r'\w+="', span):  # English, or Python
                continue
            parts = shlex.split(span)
            keys = [re.split(r"[./=]", part.lstrip("+~"))[0] for part in parts]
            if all(map(SETTING.fullmatch, parts)) and known.issuperset(keys) and "|" not in span:
                found.add(span)
    return sorted(found)


def fitting(span: str) -> list[str]:
    """Return a span's settings, after the choices whose values they are."""
    chosen = [choice for part, choices in FITTING.items() if part in span for choice in choices]
    given = shlex.split(span)
    keys = {one.partition("=")[0] for one in given}
    return [*(one for one in chosen if one.partition("=")[0] not in keys), *given]


@pytest.mark.parametrize("span", settings_in_lines())
def test_settings_in_a_line_compose(span):
    with conf():
        composed([first_of_a_sweep(argument) for argument in fitting(span)])


def test_there_are_settings_in_lines():
    assert len(settings_in_lines()) > 50


@pytest.mark.parametrize(
    "verb", sorted({command.split()[2] for command in commands("python -m lit_ft.")})
)
def test_a_verb_knows_the_options_it_is_shown_with(verb, capsys):
    shown = {
        option
        for command in commands(f"python -m {verb}")
        for option in re.findall(r"--[\w-]+", command)
    }
    with pytest.raises(SystemExit) as stop:
        import_module(verb).main(["--help"])
    assert stop.value.code == 0
    assert shown <= set(re.findall(r"--[\w-]+", capsys.readouterr().out))


def test_every_verb_is_one():
    verbs = {c.split()[2] for t in PAGES.values() for c in shell_lines(t) if "-m lit_ft" in c}
    assert verbs >= {"lit_ft.chat", "lit_ft.export", "lit_ft.preview"}
    assert all(hasattr(import_module(verb), "main") for verb in verbs)


@pytest.mark.parametrize("command", [c for c in commands("python ") if re.match(r"\w+ \w+/", c)])
def test_a_script_is_there_and_knows_its_options(command):
    _, script, *options = shlex.split(command, comments=True)
    source = (ROOT / script).read_text(encoding="utf-8")
    for option in options:
        assert not option.startswith("--") or f'"{option}"' in source, command


def test_make_knows_its_targets():
    makefile = (ROOT / "Makefile").read_text()
    for command in commands("make "):
        target = command.split()[1]
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), command


def names_you_know() -> list[tuple[str, str]]:
    rows = table(PAGES["docs/coming-from.md"], "You write", "Here")
    return [(theirs, ours) for theirs, ours, *_ in rows]


@cache
def all_settings() -> list[Any]:
    """Compose the configurations that have every setting between them."""
    choices = [[], FITTING["adapter."], ["data=mix"], FITTING["model."], ["logger=wandb"]]
    choices.append(["callbacks=[default,early_stopping]"])
    with conf():
        return [composed(one) for one in choices]


def test_there_is_a_table_of_the_names_you_know():
    assert len(names_you_know()) > 60


@pytest.mark.parametrize(("theirs", "ours"), names_you_know())
def test_the_names_you_know_lead_to_names_that_exist(theirs, ours):
    """Those with a value are composed with all other settings in lines."""
    names = [span for span in code_spans(ours) if re.fullmatch(r"[a-z_]+(\.[a-z_]+)*", span)]
    assert names or "=" in ours or ours.startswith("nothing")
    for name in names:
        key, _, last = name.rpartition(".")
        parents = [OmegaConf.select(config, key) if key else config for config in all_settings()]
        assert any(parent is not None and last in parent for parent in parents), name


def test_the_file_of_settings_that_is_shown_composes(tmp_path):
    [shown] = blocks(PAGES["docs/coming-from.md"], "yaml")
    (tmp_path / "my.yaml").write_text(shown)
    given = understood([f"--config={tmp_path / 'my.yaml'}"], config_dir=CONF).arguments
    with conf():
        config = composed(given)
    assert (config.optim.lr, config.adapter.r, config.trainer.max_epochs) == (2e-4, 32, 1)


def test_there_are_twenty_commands_of_habit():
    assert len(habits()) == 20


@pytest.mark.parametrize(("theirs", "ours", "outcome"), habits())
def test_a_command_of_habit_works_or_is_answered(theirs, ours, outcome):
    """What works composes to the same bytes as the command of ours."""

    def given(command: str) -> list[str]:
        return understood(shlex.split(command.strip("`"))[2:], config_dir=CONF).arguments

    if outcome == "works":
        same = [given(theirs), given(ours)]
        with conf():
            first, second = (OmegaConf.to_yaml(compose("train", one)) for one in same)
        assert first == second
    else:
        assert outcome == "is answered"
        with pytest.raises(ValueError) as error:
            given(theirs)
        assert ours.strip("`") in str(error.value)


def test_a_line_of_each_format_is_detected():
    known = ["Chat", "Alpaca", "PromptCompletion", "Text"]
    for page, more in {"README.md": [], "docs/your-data.md": ["Segments"]}.items():
        lines, *_ = blocks(PAGES[page], "json")
        found = [type(detect(json.loads(line))).__name__ for line in lines.splitlines()]
        assert found == known + more
    rows = {cell.strip("`") for cell, *_ in table(PAGES["docs/your-data.md"], "`data/format=`")}
    assert rows == {kind.__module__.rpartition(".")[2] for kind in available()}


def test_the_table_of_the_summary_has_its_keys():
    told = re.findall(
        r"`(\w+)`", " ".join(row[0] for row in table(PAGES["docs/summary-json.md"], "Key"))
    )
    assert set(told) == {*RunSummary(ROOT, {}).fields, "checksum"}


def test_the_table_of_callbacks_has_those_that_there_are():
    import lit_ft.callbacks

    told = {row[0].strip("`") for row in table(PAGES["docs/callbacks.md"], "Callback")}
    # Kinds of progress bars, and what the job uses, are in the reference.
    internal = {"AtomicCheckpointIO", "LineProgress", "TerminalProgress"}
    assert told == set(lit_ft.callbacks.__all__) - internal


def test_the_readme_is_short():
    assert (ROOT / "README.md").stat().st_size <= 9000


def links() -> list[tuple[str, str]]:
    return [
        (page, target)
        for page, text in PAGES.items()
        for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text))
        if "://" not in target
    ]


@pytest.mark.parametrize(("page", "target"), links())
def test_a_link_leads_to_a_file(page, target):
    path, _, anchor = target.partition("#")
    file = (ROOT / page).parent / path if path else ROOT / page
    if DOCS / "api" in file.parents and not file.parent.exists():
        pytest.skip("the reference is generated by make docs")
    assert file.exists(), target
    if anchor and file.suffix == ".md":
        text = PAGES[file.resolve().relative_to(ROOT).as_posix()]
        titles = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
        slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
        assert anchor in slugs | set(re.findall(r"^\(([\w-]+)\)=$", text, re.MULTILINE)), target


def test_names_of_the_package_exist():
    for page, text in PAGES.items():
        for span in code_spans(text):
            name = re.fullmatch(r"(lit_ft(?:\.\w+)+)(\(.*\))?", span)
            if name and not name[1].endswith(".py"):
                module, _, last = name[1].rpartition(".")
                there = hasattr(import_module(module), last) or importlib.util.find_spec(name[1])
                assert there, f"{page}: {span}"


def test_files_that_pages_name_exist():
    folders = r"(?:lit_ft|tests|benchmarks|examples|conf|docs)"
    for page, text in PAGES.items():
        for span in code_spans(text):
            if re.fullmatch(rf"{folders}/[\w./-]+", span) and not re.search(r"/x\.\w+$", span):
                assert (ROOT / span).exists(), f"{page}: {span}"


def choices_page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("choices", DOCS / "_ext" / "choices.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def plain(text: str) -> str:
    """Without Markdown's marks and line breaks."""
    return re.sub(r"[`\\\s]+", "", text)


@pytest.fixture(scope="module")
def choices() -> str:
    return choices_page().render()


def leaves(values: object, prefix: str) -> Iterator[str]:
    if isinstance(values, dict) and values:
        for key, inner in values.items():
            yield from leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    elif prefix:
        yield prefix


def files_of_conf() -> list[str]:
    found = (path.relative_to(CONF) for path in CONF.glob("**/*.yaml"))
    return sorted(path.as_posix() for path in found if path.parts[0] != "local")


@pytest.mark.parametrize("file", files_of_conf())
def test_the_page_of_choices_has_every_group_value_and_comment(file, choices):
    text = (CONF / file).read_text(encoding="utf-8")
    group, name = str(Path(file).parent), Path(file).stem
    part = choices
    if group != ".":
        anchor = f"(choice-{group}-{name})=".replace("/", "-").replace("_", "-")
        part = choices.partition(anchor)[2].partition("\n(choice-")[0]
        assert f"## `{group}`" in choices
        assert part
    package = re.search(r"^# @package (\S+)", text, re.MULTILINE)
    prefix = package[1] if package else group.replace("/", ".")
    values = {k: v for k, v in (yaml.safe_load(text) or {}).items() if k != "defaults"}
    prefix = "" if prefix in ("_global_", ".") else prefix
    for leaf in leaves(values, prefix) if values else ():
        if not leaf.startswith("hydra.help."):
            assert f"| `{leaf}` |" in part, leaf
    shown = plain(part)
    body = text.partition("\ndefaults:")[2].partition("\n\n")[2] if "\ndefaults:" in text else text
    body = body.partition("\n  help:")[0]
    for line in body.splitlines():
        said = re.search(r"(?:^|\s)#(?! @package)(.*)$", line)
        if said and not re.search(r"python train\.py", line):
            assert plain(said[1]) in shown, line


@pytest.fixture
def project(tmp_path, monkeypatch, tokenizer) -> Path:
    """A folder with the models and the data that the pages' code names."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    for folder in ("my-model", "runs/r1/export"):
        model.save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    rows = [{"prompt": f"{n} + 2?", "completion": str(n + 2)} for n in range(100)]
    (tmp_path / "my.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIT_FT_CACHE", str(tmp_path / "cache"))
    return tmp_path


CODE = [(page, code) for page, text in PAGES.items() for code in blocks(text, "python")]


@pytest.mark.parametrize(
    ("page", "code"), CODE, ids=[f"{page} {n}" for n, (page, _) in enumerate(CODE)]
)
def test_the_code_runs(page, code, project):
    exec(compile(code, page, "exec"), {"__name__": "page"})
    if "ExportHF" in code:
        assert (project / "tuned" / "model.safetensors").is_file()
    if "LastCheckpoint" in code:
        assert (project / "checkpoints" / "last.ckpt").is_file()
