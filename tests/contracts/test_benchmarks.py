"""The benchmarks: a whole and true index, results that are JSON, methods that compose."""

from __future__ import annotations

import ast
import json
import math
import re
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from support.composed import composed
from support.own_process import OwnProcess
from support.results import append_json_line, read_json_lines, write_json

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(BENCHMARKS.glob("*.py"))
RESULTS = sorted((BENCHMARKS / "results").iterdir())
INDEX = (BENCHMARKS / "README.md").read_text(encoding="utf-8").split("\n## ")[0]


def not_json(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def records(path: Path) -> list[Any]:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    return [json.loads(line, parse_constant=not_json) for line in lines]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_a_committed_result_is_json(path):
    if path.suffix != ".md":
        assert all(records(path))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_a_script_names_each_result(path):
    docstrings = [ast.get_docstring(ast.parse(script.read_text())) or "" for script in SCRIPTS]
    assert any(f"results/{path.name}" in text for text in docstrings)


def test_subspace_iteration_captures_99_percent_of_what_the_svd_does():
    in_training = result("captured_energy.json")["in_training"]
    assert in_training["subspace_iteration, every 20"]["over_svd"] >= 0.99


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_index_has_each_script_with_its_question(script):
    docstring = ast.get_docstring(ast.parse(script.read_text()))
    assert docstring is not None
    question = docstring.splitlines()[0]
    assert question.endswith("?")
    [row] = [line for line in INDEX.splitlines() if f"[{script.name}]({script.name})" in line]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == question
    assert re.search(rf"`python benchmarks/{script.name}( .*)?`", cells[2])


def test_links_of_the_index_lead_to_files():
    text = (BENCHMARKS / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (BENCHMARKS / link).exists(), link


def test_values_that_are_not_finite_are_written_as_null(tmp_path):
    record = {"loss": math.nan, "losses": [1.0, -math.inf], "lr": 1e-4, "pair": (2, "NaN")}
    plain = {"loss": None, "losses": [1.0, None], "lr": 1e-4, "pair": [2, "NaN"]}
    write_json(tmp_path / "new" / "one.json", record)
    assert records(tmp_path / "new" / "one.json") == [plain]
    for _ in range(2):
        append_json_line(tmp_path / "many.jsonl", record)
    assert read_json_lines(tmp_path / "many.jsonl") == records(tmp_path / "many.jsonl")
    assert read_json_lines(tmp_path / "many.jsonl") == [plain, plain]
    assert read_json_lines(tmp_path / "none.jsonl") == []


@pytest.mark.process
def test_an_object_of_its_own_process_keeps_its_state():
    with OwnProcess(torch.Generator, "cpu") as held:
        first, again = held.call(torch.Generator.seed), held.call(torch.Generator.initial_seed)
    assert first == again


def settings() -> list[list[str]]:
    import one_gpu
    import quality

    of_quality = [method["overrides"] for method in quality.METHODS.values()]
    return [*of_quality, *one_gpu.METHODS.values()]


@pytest.mark.parametrize("overrides", settings(), ids=" ".join)
def test_methods_compose(overrides):
    GlobalHydra.instance().clear()
    assert composed(*overrides)["module"]


def result(name: str) -> Any:
    [record] = records(BENCHMARKS / "results" / name)
    return record


def of_the_trainer() -> list[str]:
    ours, same, random = result("against_hf_trainer.json")["sides"].values()
    speeds = [f"{side['tokens_per_second']['median']:.1f}" for side in (ours, same, random)]
    return [*speeds, f"{same['lit_ft_ratio']:.2f} times"]


def of_bytes_at_scale() -> list[str]:
    def held(name: str) -> str:
        counted = result("at_scale.json")["bytes"][name]
        return f"{sum(size for what, size in counted.items() if what != 'sent') / 1e9:.1f} GB"

    optims = ("adamw", "galore_subspace")
    return [held(f"{ranks} ranks, fsdp, {optim}") for ranks in (8, 64) for optim in optims]


def of_captured_energy() -> list[str]:
    record = result("captured_energy.json")
    rounds = record["subspace_iteration_on_one_gradient"]["3"]
    shares = [rounds["layers_together"], rounds["lowest"]]
    shares += [row["over_svd"] for name, row in record["in_training"].items() if "svd" not in name]
    return [f"{share:.3f}" for share in shares]


def of_collectives() -> list[str]:
    megabytes = result("communication.json")["megabytes"]
    optims = ("adamw", "galore_subspace")
    runs = [megabytes[f"{strategy}, {optim}"] for strategy in ("ddp", "fsdp") for optim in optims]
    return [f"{run['median']:,.1f} MB" for run in runs]


def of_encoding() -> list[str]:
    sides = result("encoding.json")["sides"]
    speeds = [f"{side['rows_per_second']['median']:,.0f}" for side in sides.values()]
    ratios = [f"{sides[name]['lit_ft_ratio']:.2f} times" for name in sides if name != "lit_ft"]
    return [*speeds, *ratios]


def of_layerwise_steps() -> list[str]:
    return [f"{pair['ratio']:.2f}" for pair in result("layerwise.json")["pairs"].values()]


def of_steps() -> list[str]:
    sizes = result("optimizer_step.json")["sizes"].values()
    found = [size["galore_subspace, every 4"] for size in sizes]
    times = [f"{row['times_faster_than_adamw']:.2f} times" for row in found]
    return [*times, *(f"{row['median']:.2f} s" for row in found)]


def of_steps_on_a_gpu() -> list[str]:
    on_gpu = result("optimizer_step_cuda.json")["sizes"]["four_of_8b"]
    rows = (on_gpu["adamw"], on_gpu["galore_subspace, every 4"])
    return [f"{row['median']:.3f} s" for row in rows]


def of_quality() -> list[str]:
    runs = [run for run in records(BENCHMARKS / "results" / "quality.jsonl") if run["lr"] == 1e-4]
    runs = [run for run in runs if run["settings"]["accelerator"] == "cpu"]
    methods = ("adamw", "galore_subspace_r128")
    adamw, galore = (
        mean(run["val_loss"] for run in runs if run["method"] == name) for name in methods
    )
    start = runs[0]["initial_val_loss"]
    return [f"{adamw:.3f}", f"{galore:.3f}", f"{(start - galore) / (start - adamw):.1%}"]


@pytest.mark.parametrize(
    ("file", "figures"),
    [
        ("against_hf_trainer.md", of_the_trainer),
        ("at_scale.json", of_bytes_at_scale),
        ("captured_energy.json", of_captured_energy),
        ("communication.json", of_collectives),
        ("encoding.json", of_encoding),
        ("layerwise.json", of_layerwise_steps),
        ("optimizer_step.json", of_steps),
        ("optimizer_step_cuda.json", of_steps_on_a_gpu),
        ("quality.jsonl", of_quality),
    ],
)
def test_the_figures_of_the_index_are_those_of_the_results(file, figures):
    [row] = [line for line in INDEX.splitlines() if f"(results/{file})" in line]
    for figure in figures():
        assert figure.replace("%", " %") in row, figure
