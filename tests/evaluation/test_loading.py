"""Tasks are found by name, and what is not there is refused with what helps."""

from __future__ import annotations

import pytest

from lit_ft.compat.refusal import Refusal
from lit_ft.evaluation import loading
from lit_ft.evaluation.loading import load_tasks
from tests.support.successors import NAME, write_task

GROUP = """
group: letters
task:
  - successor
aggregate_metric_list:
  - metric: acc
"""


@pytest.fixture
def own_alone(monkeypatch) -> list[bool]:
    """Leave out lm-eval's own tasks, which take seconds to read, and note if they are wanted."""
    manager, wanted = loading.task_manager, []

    def without_defaults(folder, *, with_defaults):
        wanted.append(with_defaults)
        return manager(folder, with_defaults=False)

    monkeypatch.setattr(loading, "task_manager", without_defaults)
    return wanted


def test_the_task_that_comes_along_is_found_without_reading_those_of_lm_eval(own_alone):
    tasks = load_tasks(["docstring_choice"])
    assert tasks.names == ("docstring_choice",)
    assert own_alone == [False]


def test_a_task_of_ones_own_is_found_in_a_folder_and_by_its_path(own_alone, tmp_path):
    file = write_task(tmp_path)
    assert load_tasks([NAME], tmp_path).names == load_tasks([str(file)]).names == (NAME,)
    assert own_alone == [False, False]


def test_a_group_may_hold_tasks_of_lm_eval(own_alone, tmp_path):
    write_task(tmp_path)
    (tmp_path / "letters.yaml").write_text(GROUP)
    tasks = load_tasks(["letters", NAME], tmp_path)
    assert tasks.names == ("letters", NAME)
    assert list(tasks.loaded["tasks"]) == [NAME]
    assert own_alone == [False, True]


def test_a_folder_does_not_replace_the_tasks_that_come_along(own_alone, tmp_path):
    own = (loading.OWN / "docstring_choice.yaml").read_text()
    (tmp_path / "docstring_choice.yaml").write_text(own.replace("version: 1", "version: 99"))
    tasks = load_tasks(["docstring_choice"], tmp_path)
    assert tasks.loaded["tasks"]["docstring_choice"].config.metadata["version"] == 1


def test_an_unknown_name_is_answered_with_the_nearest(own_alone):
    with pytest.raises(Refusal) as error:
        load_tasks(["docstring_choise"])
    assert str(error.value) == (
        "lm-eval has no task docstring_choise; the nearest is docstring_choice. See "
        "`lm-eval ls tasks` or give the folder of your own tasks as include_path."
    )
    assert "eval.include_path" in error.value.on_command_line


@pytest.mark.slow
def test_the_nearest_names_of_lm_eval_are_told():
    with pytest.raises(Refusal, match="no task arc_eazy; the nearest are arc_easy"):
        load_tasks(["arc_eazy"])


def test_without_lm_eval_the_refusal_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(Refusal, match=r"not installed. Install it: `pip install 'lm_eval\[hf\]'`"):
        load_tasks(["docstring_choice"])


def test_a_file_and_a_folder_that_are_not_there_are_named(tmp_path):
    with pytest.raises(Refusal, match=r"no.yaml is a file that does not exist. Check the path"):
        load_tasks([str(tmp_path / "no.yaml")])
    with pytest.raises(Refusal, match="include_path=.*/no: there is no such folder"):
        load_tasks([NAME], tmp_path / "no")


def test_data_that_needs_a_network_is_named_with_what_needs_none(tmp_path):
    with pytest.raises(Refusal) as error:
        load_tasks([str(write_task(tmp_path, data="offline"))])
    said = str(error.value)
    assert "Couldn't reach 'a/b' on the Hub" in said and 'tasks=["docstring_choice"]' in said
    assert "eval.tasks=[docstring_choice]" in error.value.on_command_line


def test_a_task_that_fails_is_named_with_its_error(tmp_path):
    with pytest.raises(Refusal, match=r"successor.yaml cannot be loaded: 'text'"):
        load_tasks([str(write_task(tmp_path, data="broken"))])


def test_a_task_that_runs_what_the_model_writes_is_refused(tmp_path):
    file = write_task(tmp_path, more="unsafe_code: true\n")
    with pytest.raises(Refusal, match="successor runs the code that a model writes. Score the ex"):
        load_tasks([str(file)])
