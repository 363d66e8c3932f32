"""Score a model that is in memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lit_ft.evaluation.loading import Tasks, seed_as_lm_eval
from lit_ft.evaluation.quiet import quiet
from lit_ft.evaluation.scores import Scores, scores_of

_BOOTSTRAPS = 1000  # lm-eval takes 100,000, on all cores


def score(
    model: Any,
    tokenizer: Any,
    tasks: Tasks,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    apply_chat_template: bool = False,
) -> Scores:
    """Return the scores of a model, as `lm_eval --model hf` would find them.

    The model computes in the precision of its weights. The caller keeps its modes and the random
    state; see `lit_ft.callbacks.LMEval`. Tasks can be scored once.

    Args:
        model: The transformers model, or a peft model around one.
        tokenizer: The model's tokenizer, which is left unchanged.
        tasks: The tasks to score it on.
        limit: The number of documents to take of each task; None takes all.
        num_fewshot: The number of solved examples in front of each question; None leaves it to the
            task. A task that says 0 keeps to it.
        batch_size: The number of texts that the model reads at a time.
        apply_chat_template: Whether each question is a message in the tokenizer's chat template.
    """
    # `simple_evaluate` would start other programs to describe the machine, which takes seconds.
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    with quiet(), _keeps_weights(model):
        # lm-eval may give the tokenizer a token to pad with.
        lm = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        seed_as_lm_eval()
        torch.manual_seed(DEFAULT_OTHER_SEED)  # the GPU's state too
        for task in tasks.loaded["tasks"].values():
            _set_examples(task, num_fewshot)
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        results = evaluate(
            lm=lm,
            task_dict=tasks.loaded,
            limit=limit,
            bootstrap_iters=_BOOTSTRAPS,
            log_samples=False,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=True,
        )
    return scores_of(results, tasks.names)


def _set_examples(task: Any, number: int | None) -> None:
    """Set the number of solved examples as `simple_evaluate` does."""
    usual = task.get_config("num_fewshot")
    if usual != 0:
        task.set_config(key="num_fewshot", value=(usual or 0) if number is None else number)


@contextmanager
def _keeps_weights(model: Any) -> Iterator[None]:
    """Keep lm-eval from tying weights, which would give an adapter's layer a weight of its own."""
    model.tie_weights = lambda: None
    try:
        yield
    finally:
        del model.tie_weights
