"""The benchmarks: a whole and true index, results that are JSON, methods that compose."""

from __future__ import annotations

import ast
import json
import math
import re
import tomllib
import zipfile
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.composed import composed
from support.gpu_cells import GROUPS, settings_of
from support.own_process import OwnProcess
from support.pack import keep_libraries, needed
from support.peers.figures import latest
from support.peers.page import index_figures
from support.recommended_table import CARDS, MODELS, PAGE, with_table
from support.results import append_json_line, read_json_lines, write_json

from lit_ft.run.settings import admit

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
    import quality

    return [method["overrides"] for method in quality.METHODS.values()]


@pytest.mark.parametrize("overrides", settings(), ids=" ".join)
def test_methods_compose(overrides):
    GlobalHydra.instance().clear()
    assert composed(*overrides)["module"]


ON_A_GPU = [cell for group in GROUPS.values() for cell in group]


@cache
def published_shape(name: str) -> dict[str, Any]:
    GlobalHydra.instance().clear()
    return composed(f"model={name}")["model"]["config"]


@pytest.mark.parametrize(
    ("cell", "tiny"), [*((cell, False) for cell in ON_A_GPU), (ON_A_GPU[0], True)]
)
def test_a_cell_on_a_gpu_has_a_published_shape_and_settings_that_are_admitted(cell, tiny):
    GlobalHydra.instance().clear()
    arguments = settings_of(cell, device="cpu" if tiny else "cuda", tiny=tiny)
    config = composed(*arguments)
    admit(config, config, arguments)
    model = config["model"]
    published = published_shape(model["name"])
    made = {"model_type": model["model_type"], **model["config"]}
    assert tiny or {name: made[name] for name in published} == published
    instantiate(model, _convert_="all").check()


def test_each_stage_on_a_gpu_is_a_command_that_its_script_accepts(tmp_path):
    import on_gpu
    import one_gpu
    import optimizer_step

    parsers = {"one_gpu.py": one_gpu._parser(), "optimizer_step.py": optimizer_step._parser()}
    for device, tiny in (("cuda", False), ("cpu", True)):
        for stage in on_gpu.stages(tmp_path, device=device, tiny=tiny).values():
            [file] = [Path(one) for one in stage.command if one.endswith(".py")]
            assert (BENCHMARKS.parent / file).is_file()
            if file.name in parsers:
                parsed = parsers[file.name].parse_args(stage.command[1:])
                assert (parsed.device, parsed.output) == (device, tmp_path)


def test_all_that_lit_ft_needs_is_packed_apart_from_torch():
    found = needed("3.12", {"numpy"})
    listed = tomllib.loads((BENCHMARKS.parent / "pyproject.toml").read_text())["project"]
    wanted = {canonicalize_name(Requirement(one).name) for one in listed["dependencies"]}
    assert wanted - found.keys() == {"torch"}
    assert "antlr4-python3-runtime" in found  # what hydra-core needs
    assert not any(name.startswith(("numpy", "nvidia", "triton")) for name in found)


def test_bitsandbytes_is_packed_for_the_wanted_versions_of_cuda_alone(tmp_path):
    kept = ["bitsandbytes/__init__.py", "bitsandbytes/libbitsandbytes_cpu.so"]
    kept += ["bitsandbytes/libbitsandbytes_cuda130.so"]
    wheel = tmp_path / "bitsandbytes-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (*kept, "bitsandbytes/libbitsandbytes_cuda128.so"):
            archive.writestr(name, name)
    keep_libraries(wheel, ["130"])
    with zipfile.ZipFile(wheel) as archive:
        assert archive.namelist() == kept
        assert [archive.read(name).decode() for name in kept] == kept


def result(name: str) -> Any:
    [record] = records(BENCHMARKS / "results" / name)
    return record


def test_each_recommended_way_fits_and_the_docs_have_the_table_of_them():
    models = result("recommended.json")["models"]
    assert models.keys() <= MODELS.keys()
    for found in (one for cards in models.values() for one in cards):
        for recipe in found["recipes"]:
            taken = recipe["peak_bytes"] + recipe["outside_bytes"]["high"]
            assert taken <= found["card"]["memory_bytes"]
    page = PAGE.read_text(encoding="utf-8")
    assert with_table(page, models) == page


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


def of_memory_plans() -> list[str]:
    found = result("memory_plan.json")
    errors = (found["lowest_error"], found["highest_error"])
    count = f"{found['number']} runs"
    median = f"{found['median_of_absolute_errors']:.3%}"
    return [count, median, *(f"{error:+.2%}" for error in errors), str(len(found["misses"]))]


def of_peers() -> list[str]:
    return index_figures(latest(records(BENCHMARKS / "results" / "peers.jsonl")))


def of_recommendations() -> list[str]:
    by_card = dict(zip(CARDS, result("recommended.json")["models"]["llama_3_1_8b"], strict=True))
    best = [by_card[card]["recipes"][0] for card in ("12GB", "24GB")]
    return [f"{recipe['peak_bytes'] / 2**30:.1f} GiB" for recipe in best]


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
        ("memory_plan.md", of_memory_plans),
        ("optimizer_step.json", of_steps),
        ("peers.md", of_peers),
        ("recommended.json", of_recommendations),
        ("optimizer_step_cuda.json", of_steps_on_a_gpu),
        ("quality.jsonl", of_quality),
    ],
)
def test_the_figures_of_the_index_are_those_of_the_results(file, figures):
    [row] = [line for line in INDEX.splitlines() if f"(results/{file})" in line]
    for figure in figures():
        assert figure.replace("%", " %") in row, figure
