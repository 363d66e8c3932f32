"""Measure what a model unlearns: its loss on an unrelated text, before and after training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F

from lit_ft.callbacks._support.evaluating import evaluating, why_not_evaluated
from lit_ft.terminal import stage

_NOT_MEASURED = "Forgetting is not measured"
_ROWS = 64  # logits that are float32 at a time
_TEXT = Path(__file__).parent / "_support" / "everyday.txt"


class Forgetting(Callback):
    """Measures the loss on a text that has nothing to do with the training, before and after it.

    A model that learns a narrow task gets worse at others; how much depends on the method and the
    learning rate. Every method sees the same tokens, so the differences are not those of a sample.
    Training is bit for bit the same as without this callback. It needs `pl_module.model`, which
    returns `logits`, and `pl_module.tokenizer`. Without them, and under FSDP1 and DeepSpeed, it
    warns and measures nothing. A checkpoint keeps the loss from before training.

    Args:
        path: The path of a text file in UTF-8; None takes one of 770 English words on everyday
            things, which comes with lit_ft.
        max_length: The largest number of tokens that the model sees at a time.

    Attributes:
        before: The mean loss of a token before training, in nats; None if it is not measured.
        after: The mean loss of a token after training, in nats; None if it is not measured.

    Example:
        >>> import lightning as L
        >>> forgetting = Forgetting()
        >>> trainer = L.Trainer(callbacks=[forgetting], logger=False, accelerator="cpu")
    """

    def __init__(self, path: str | None = None, max_length: Annotated[int, Ge(2)] = 512) -> None:
        self.text = _read(_TEXT if path is None else Path(path).expanduser())
        self.max_length = max_length
        self.before: float | None = None
        self.after: float | None = None

    @property
    def increase(self) -> float | None:
        """How much the loss has risen; None unless it was measured twice."""
        if self.before is None or self.after is None:
            return None
        return self.after - self.before

    def state_dict(self) -> dict[str, Any]:
        """Return the loss before training, and what it is that of."""
        return {"before": self.before, "text": self.text, "max_length": self.max_length}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the loss before training, if it is that of the same tokens."""
        if {**state_dict, "before": self.before} == self.state_dict():
            self.before = state_dict["before"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Drop the measurements of an earlier fit, before a checkpoint brings those of this one."""
        if stage == "fit":
            self.before = self.after = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the loss, unless a checkpoint has brought it."""
        if self.before is not None:
            return
        if trainer.global_step > 0:
            rank_zero_warn(f"{_NOT_MEASURED}: the checkpoint has no loss on this text.")
        elif (reason := why_not_evaluated(trainer, pl_module)) is not None:
            rank_zero_warn(f"{_NOT_MEASURED}: {reason}.")
        else:
            self.before = self._loss(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the loss again, and log how much it has risen as `forgetting`.

        The peak memory of the training has been read by now.
        """
        if self.before is None:
            return
        self.after = self._loss(trainer, pl_module)
        for logger in trainer.loggers:
            logger.log_metrics({"forgetting": self.after - self.before}, step=trainer.global_step)
            logger.save()

    def _loss(self, trainer: Trainer, module: LightningModule) -> float:
        with stage("measuring forgetting"), trainer.precision_plugin.forward_context():
            return loss_of_text(
                module.model, module.tokenizer, self.text, max_length=self.max_length
            )


def loss_of_text(model: Any, tokenizer: Any, text: str, *, max_length: int) -> float:
    """Return the mean loss of the tokens of a text, in nats.

    The text is cut into pieces, and each token of a piece but its first is predicted. The modes of
    the model's modules and the random state are left unchanged.

    Args:
        model: The model, which returns `logits`.
        tokenizer: The model's tokenizer.
        text: The text.
        max_length: The largest number of tokens of a piece.

    Raises:
        ValueError: If the text has fewer than two tokens.
    """
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], device=model.device)
    pieces = [piece for piece in torch.split(ids, max_length) if len(piece) > 1]
    if not pieces:
        raise ValueError("A text whose loss is measured needs two tokens or more.")
    with evaluating(model):
        losses = [_losses(model, piece) for piece in pieces]
    return float(torch.cat(losses).mean())


def _losses(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
    rows = zip(torch.split(logits, _ROWS), torch.split(ids[1:], _ROWS), strict=True)
    return torch.cat([F.cross_entropy(row.float(), at, reduction="none") for row, at in rows])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ValueError(f"The text whose loss is measured cannot be read: {error}") from error
