"""`resume=auto` takes a run's own arguments from its folder, which may be a stranger's."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lit_ft.run.arguments import for_hydra
from lit_ft.run.own_arguments import with_own_arguments


def record(folder: Path, *arguments: str, start: str = "") -> None:
    file = folder / ".hydra" / start / "overrides.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.dump(list(arguments)))


@pytest.mark.parametrize(
    "hostile",
    [
        "--experimental-rerun=evil.pickle",
        "--config-dir=/evil",
        "-m",
        "-cd=/evil",
        "--multirun",
        "hydra.callbacks.mine._target_=x.Y",
        "+hydra/launcher=evil",
        "logger@hydra.job_logging=evil",
        "trusted_packages=[evil]",
        "model.trust_remote_code=true",
        "data.sources=[{trust_remote_code: true}]",
        "eval.include_path=evil",
        "eval.tasks=[arc_easy,evil.yaml]",
        "seed=1,2",
        "optim=glob(*)",
        "no such argument",
        "a",
    ],
)
def test_nothing_but_settings_of_the_job_is_taken(tmp_path: Path, hostile: str) -> None:
    record(tmp_path, hostile, "optim=adamw", "~callbacks.samples")
    given = [f"run_dir={tmp_path}", "resume=auto"]
    own = ["optim=adamw", "~callbacks.samples"]
    assert with_own_arguments(given) == ([*own, *given], own)


def test_what_the_command_line_gives_is_not_repeated(tmp_path: Path) -> None:
    record(tmp_path, "optim=adamw", "seed=1", "overwrite=true", "resume=null")
    _, own = with_own_arguments([f"run_dir={tmp_path}", "resume=auto", "seed=2"])
    assert own == ["optim=adamw"]


def test_the_newest_start_counts_and_other_folders_do_not(tmp_path: Path) -> None:
    given = [f"run_dir={tmp_path}", "resume=auto"]
    for start in ("", "2", "10", "2x", "\u00b2", "30-old"):
        record(tmp_path, f"seed={len(start)}{start[:2]}", start=start)
    assert with_own_arguments(given)[1] == ["seed=210"]


def test_options_stay_in_front_of_the_settings(tmp_path: Path) -> None:
    """Hydra reads settings on both sides of an option as a wrong command line."""
    record(tmp_path, "optim=adamw")
    arguments, _ = with_own_arguments(["--cfg", "job", f"run_dir={tmp_path}", "resume=auto"])
    assert for_hydra(arguments)[:3] == ["--cfg", "job", "optim=adamw"]


def test_the_secret_of_a_file_is_left_to_the_file(tmp_path: Path) -> None:
    reference = "${oc.env:LIT_FT_SECRET_LOGGER__API_KEY}"
    record(tmp_path, "experiment=mine", f"++logger.api_key={reference}", f"data.token={reference}")
    arguments, _ = with_own_arguments([f"run_dir={tmp_path}", "resume=auto"])
    assert arguments[:2] == ["experiment=mine", f"data.token={reference}"]


def test_another_length_replaces_that_of_the_run(tmp_path: Path) -> None:
    record(tmp_path, "trainer.max_epochs=1", "trainer.max_steps=-1", "model=tiny")
    longer = [f"run_dir={tmp_path}", "resume=auto", "trainer.max_steps=500"]
    assert with_own_arguments(longer)[0] == ["model=tiny", *longer]
