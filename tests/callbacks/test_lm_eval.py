"""Scores of a trained model on tasks of lm-eval, of a module that knows no lit_ft."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_ft.callbacks import LMEval, lm_eval
from lit_ft.callbacks._support import evaluating
from lit_ft.evaluation import loading
from lit_ft.run.files import read_summary
from tests.support.letters import Plain, letters_tokenizer
from tests.support.running import SHORT, run_job
from tests.support.successors import NAME, Knowing, write_task
from tests.support.tiny_module import trainer_of


def fit(tmp_path, *callbacks, module, logger=False):
    trainer = trainer_of(tmp_path, callbacks=list(callbacks), logger=logger)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(2)
    trainer.fit(module)
    return module


def scoring(tmp_path, **options) -> LMEval:
    return LMEval([str(write_task(tmp_path))], **options)


@pytest.mark.parametrize(("is_right", "acc"), [(True, 1.0), (False, 0.0)])
def test_a_model_that_knows_the_answers_is_right_and_its_opposite_wrong(is_right, acc, tmp_path):
    scores = scoring(tmp_path)
    fit(tmp_path, scores, module=Knowing(is_right=is_right))
    assert scores.scores == {NAME: {"acc": acc, "acc_stderr": 0.0}}


def test_training_is_the_same_to_the_bit(tmp_path):
    states = []
    for callbacks in ([], [scoring(tmp_path)]):
        module = fit(tmp_path, *callbacks, module=Plain())
        drawn = (random.random(), np.random.rand(), torch.rand(1).item())
        modes = [one.training for one in module.modules()]
        states.append((module.losses, modes, drawn, torch.is_grad_enabled()))
        states[-1] += ([one.tolist() for one in module.parameters()],)
    assert states[0] == states[1]
    assert callbacks[0].scores


def test_the_scores_are_logged(tmp_path):
    logger = CSVLogger(tmp_path, name="", version="")
    fit(tmp_path, scoring(tmp_path), module=Knowing(), logger=logger)
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0]
    assert {"eval/successor/acc", "eval/successor/acc_stderr"} <= set(header.split(","))


def test_a_second_fit_scores_again(tmp_path):
    scores, module = scoring(tmp_path), Knowing()
    fit(tmp_path, scores, module=module)
    first, scores.scores = scores.scores, {}
    fit(tmp_path, scores, module=module)
    assert scores.scores == first


def test_without_tasks_nothing_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(lm_eval, "load_tasks", None)
    scores = LMEval()
    fit(tmp_path, scores, module=Plain())
    assert scores.scores == {}


def test_a_task_that_is_not_there_is_refused_before_the_model_is_built(tmp_path):
    class Late(Plain):
        def configure_model(self):
            raise AssertionError("built")

    with pytest.raises(ValueError, match=r"no.yaml is a file that does not exist"):
        fit(tmp_path, LMEval([str(tmp_path / "no.yaml")]), module=Late())


def test_a_model_in_the_wrapper_of_a_strategy_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluating, "_SHARDED", (SingleDeviceStrategy,))
    scores = scoring(tmp_path)
    with pytest.warns(UserWarning, match="No scores: the model is sharded by SingleDeviceStrat"):
        fit(tmp_path, scores, module=Knowing())
    assert scores.scores == {}


def test_a_model_that_ranks_share_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(lm_eval, "is_model_sharded", lambda model: True)
    scores = scoring(tmp_path)
    with pytest.warns(UserWarning, match="No scores: the model is sharded over ranks. `lm_eval "):
        fit(tmp_path, scores, module=Knowing())
    assert scores.scores == {}


def test_a_module_without_a_model_trains_all_the_same(tmp_path):
    scores = scoring(tmp_path)
    with pytest.warns(UserWarning, match="BoringModel has no `model` and `tokenizer`"):
        fit(tmp_path, scores, module=BoringModel())
    assert scores.scores == {}


def test_a_task_that_fails_in_the_end_costs_no_trained_model(tmp_path):
    scores = LMEval([str(write_task(tmp_path, text="!function questions.text_of_first"))])
    with pytest.warns(UserWarning, match="No scores: lm-eval failed with .*no text for b"):
        fit(tmp_path, scores, module=Knowing())
    assert scores.scores == {}


def test_a_chat_template_that_is_missing_is_named_before_training(tmp_path):
    scores = scoring(tmp_path, apply_chat_template=True)
    with pytest.raises(MisconfigurationException, match="the tokenizer has no chat template"):
        fit(tmp_path, scores, module=Plain(letters_tokenizer(None)))


def test_a_text_is_no_list_of_tasks():
    with pytest.raises(ValueError, match=r"write \['docstring_choice'\]"):
        LMEval("docstring_choice")


def test_a_run_keeps_its_scores_in_its_summary(tmp_path):
    summary = run_job(
        tmp_path / "run", "model=tiny", *SHORT, "eval.tasks=[docstring_choice]", "eval.limit=4"
    )
    [(task, values)] = summary["scores"].items()
    assert task == "docstring_choice" and list(values) == [
        *("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
    ]
    assert values["acc"] in (0, 0.25, 0.5, 0.75, 1)


def test_a_run_that_is_stopped_while_it_is_scored_has_trained_and_exported(tmp_path, monkeypatch):
    before: list = []

    def stopped(*_, **__):
        before.append(read_summary(tmp_path / "run"))
        raise SIGTERMException

    monkeypatch.setattr(lm_eval, "score", stopped)
    given = ["model=tiny", *SHORT, "trainer.max_steps=1", "eval.tasks=[docstring_choice]"]
    with pytest.raises(SystemExit):
        run_job(tmp_path / "run", *given)
    summary = read_summary(tmp_path / "run")
    assert summary["status"] == "interrupted" and summary["scores"] is None
    assert summary["ended"] == "max_steps=1 reached, then SIGTERM"
    assert before[0]["ended"] == "max_steps=1 reached"
    for one in (*before, summary):
        assert one["export_path"] == str(tmp_path / "run" / "export")


def test_a_finished_run_is_scored_without_training_and_keeps_its_scores(tmp_path):
    given = ["model=tiny", *SHORT, "trainer.max_steps=1", "resume=auto"]
    assert run_job(tmp_path / "run", *given)["scores"] is None
    tasks = ["eval.tasks=[docstring_choice]", "eval.limit=2"]
    scored = run_job(tmp_path / "run", *given, *tasks)
    assert scored["steps"] == 1 and list(scored["scores"]) == ["docstring_choice"]
    again = run_job(tmp_path / "run", *given)
    assert again["scores"] == scored["scores"]


def test_a_run_on_an_unknown_task_loads_no_model(tmp_path, monkeypatch):
    manager = loading.task_manager
    monkeypatch.setattr(
        loading, "task_manager", lambda folder, **_: manager(folder, with_defaults=False)
    )
    with pytest.raises(Exception, match="no task docstring_choise; the nearest is docstring_cho"):
        run_job(tmp_path / "run", "model=tiny", *SHORT, "eval.tasks=[docstring_choise]")
    assert not (tmp_path / "run" / "checkpoints").exists()
