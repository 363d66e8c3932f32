"""Score the trained model on downstream tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from lit_ft.callbacks._support.evaluating import evaluating, why_not_evaluated
from lit_ft.compat.ranges import Count, WholeNumber
from lit_ft.distributed.waiting import others_wait
from lit_ft.evaluation.harness import score
from lit_ft.evaluation.loading import Tasks, load_tasks
from lit_ft.evaluation.scores import Scores
from lit_ft.measure import is_out_of_memory
from lit_ft.tensors.sharding import is_model_sharded
from lit_ft.terminal import stage as show_stage


class LMEval(Callback):
    """Scores the trained model on tasks of lm-eval, EleutherAI's evaluation harness.

    It scores `pl_module.model`, with `pl_module.tokenizer`, as it is in memory after the last step,
    in the precision of its weights. Those are the weights that `ExportHF` writes. An adapter is
    scored unmerged, and over quantised weights if the model has them. Training is bit for bit the
    same as without this callback. Tasks are loaded before the model, so that one that is not there
    costs no training. Without tasks, nothing happens, and lm-eval need not be installed.

    Of several ranks, rank 0 scores and the others wait, however long that takes. A model that is
    sharded over ranks is not scored, nor is a module without `model` and `tokenizer`: there, and if
    lm-eval fails after training, a warning is given.

    Args:
        tasks: The names of lm-eval's tasks, groups and tags, or paths of YAML files that describe
            one. `docstring_choice`, which needs no network, comes with lit_ft.
        include_path: The path of a folder with YAML files of further tasks; None for no folder.
            Such files can run Python code.
        limit: The number of documents to take of each task; None takes all.
        num_fewshot: The number of solved examples in front of each question; None leaves it to the
            task. A task that says 0 keeps to it.
        batch_size: The number of texts that the model reads at a time.
        apply_chat_template: Whether each question is a message in the tokenizer's chat template.

    Attributes:
        scores: The values of each task's metrics, with their standard errors as `METRIC_stderr`,
            keyed by task; empty if nothing is scored.

    Raises:
        ValueError: In `setup`, if lm-eval, a task, its data or the folder is not there.

    Example:
        >>> import lightning as L
        >>> lm_eval = LMEval(["docstring_choice"], limit=50)
        >>> trainer = L.Trainer(callbacks=[lm_eval], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        tasks: Sequence[str] = (),
        include_path: str | None = None,
        limit: Count | None = None,
        num_fewshot: WholeNumber | None = None,
        batch_size: Count = 8,
        apply_chat_template: bool = False,
    ) -> None:
        if isinstance(tasks, str):
            raise ValueError(f"tasks must be a list of names: write [{tasks!r}].")
        self.tasks = tuple(tasks)
        self.include_path = include_path
        self.limit = limit
        self.num_fewshot = num_fewshot
        self.batch_size = batch_size
        self.apply_chat_template = apply_chat_template
        self.scores: Scores = {}
        self._loaded: Tasks | None = None

    def load(self) -> None:
        """Load the tasks if they are not loaded yet. `setup` does it, if nobody has before."""
        if self.tasks and self._loaded is None:
            # Without CUDA, which other processes may have to be started before.
            with show_stage("loading the tasks"), isolate_rng(include_cuda=False):
                self._loaded = load_tasks(self.tasks, self.include_path)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the tasks, and drop the scores of an earlier fit."""
        if stage == "fit":
            self.scores = {}
            self.load()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before training, say if the model cannot be scored after it."""
        if self._loaded is None:
            return
        if (reason := _obstacle(trainer, pl_module)) is not None:
            rank_zero_warn(
                f"No scores: {reason}. `lm_eval --model hf --model_args pretrained=FOLDER` scores "
                "an exported model."
            )
            self._loaded = None
        elif self.apply_chat_template and not _chat_template(pl_module):
            raise MisconfigurationException(
                "apply_chat_template: the tokenizer has no chat template. Score without it, or "
                "give the tokenizer one."
            )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the model, and log the scores as `eval/TASK/METRIC`.

        The peak memory of the training has been read by now.
        """
        tasks, self._loaded = self._loaded, None
        if tasks is None:
            return
        with others_wait(trainer) as is_first:
            if is_first:
                self._score_and_log(tasks, trainer, pl_module)

    def _score_and_log(self, tasks: Tasks, trainer: Trainer, module: LightningModule) -> None:
        try:
            self.scores = self._score(tasks, module)
        except Exception as error:  # of a task's own code; none may cost the trained model
            hint = " A smaller batch_size needs less." if is_out_of_memory(error) else ""
            rank_zero_warn(f"No scores: lm-eval failed with {error!r}.{hint}")
            return
        flat = {
            f"eval/{task}/{metric}": value
            for task, values in self.scores.items()
            for metric, value in values.items()
        }
        for logger in trainer.loggers:
            logger.log_metrics(flat, step=trainer.global_step)
            logger.save()

    def _score(self, tasks: Tasks, module: LightningModule) -> Scores:
        with show_stage(f"scoring {', '.join(tasks.names)}"), evaluating(module.model):
            return score(
                module.model,
                module.tokenizer,
                tasks,
                limit=self.limit,
                num_fewshot=self.num_fewshot,
                batch_size=self.batch_size,
                apply_chat_template=self.apply_chat_template,
            )


def _chat_template(module: LightningModule) -> Any:
    return getattr(module.tokenizer, "chat_template", None)


def _obstacle(trainer: Trainer, module: LightningModule) -> str | None:
    """Return why the model cannot be scored; None if it can."""
    reason = why_not_evaluated(trainer, module)
    if reason is None and is_model_sharded(module.model):
        return "the model is sharded over ranks"
    return reason
