"""Scores of a model in memory: what lm-eval is given, and that nothing is left behind."""

from __future__ import annotations

import os

import pytest
from transformers import LlamaForCausalLM

from lit_ft.evaluation.harness import score
from lit_ft.evaluation.loading import Tasks, load_tasks
from tests.support.letters import letters_tokenizer
from tests.support.successors import NAME, knowing_model, write_task


@pytest.fixture
def tasks(tmp_path) -> Tasks:
    return load_tasks([str(write_task(tmp_path))])


def requests_of(tasks: Tasks) -> list[tuple[str, str]]:
    return [one.args for one in tasks.loaded["tasks"][NAME].instances]


def test_a_limit_is_a_number_of_documents(tasks):
    scores = score(knowing_model(), letters_tokenizer(), tasks, limit=3)
    assert requests_of(tasks) == [
        *(("a", "z"), ("a", "b")),
        *(("b", "c"), ("b", "z")),
        *(("c", "z"), ("c", "d")),
    ]
    assert scores == {NAME: {"acc": 1.0, "acc_stderr": 0.0}}


def test_solved_examples_stand_in_front_of_a_question(tasks):
    score(knowing_model(), letters_tokenizer(), tasks, limit=2, num_fewshot=2)
    [context, *_] = [context for context, _ in requests_of(tasks)]
    *examples, question = context.split("\n\n")
    assert question == "a" and len(examples) == 2
    assert all(ord(after) - ord(letter) == 1 for letter, after in examples)


def test_a_chat_template_is_applied_if_it_is_wanted(tasks):
    score(knowing_model(), letters_tokenizer(), tasks, limit=1, apply_chat_template=True)
    assert requests_of(tasks) == [("uaa", "z"), ("uaa", "b")]  # user: a, assistant:


def test_an_error_that_needs_a_bootstrap_takes_no_process(tmp_path, capfd):
    """A unit test fails if it starts one."""
    f1 = "  - metric: f1\n    aggregation: f1\n    higher_is_better: true\n"
    scores = score(
        knowing_model(), letters_tokenizer(), load_tasks([str(write_task(tmp_path, more=f1))])
    )
    assert scores[NAME]["f1"] == 1.0 and scores[NAME]["f1_stderr"] == 0.0
    assert capfd.readouterr() == ("", "")
    assert "DISABLE_MULTIPROC" not in os.environ


def test_the_model_and_the_tokenizer_are_as_they_were(tasks, monkeypatch):
    model, tokenizer = knowing_model(), letters_tokenizer()

    def fail(self):
        raise AssertionError("tied")

    monkeypatch.setattr(LlamaForCausalLM, "tie_weights", fail)
    attributes = set(vars(model))
    score(model, tokenizer, tasks, limit=1)
    assert set(vars(model)) == attributes
    assert tokenizer.pad_token is None
