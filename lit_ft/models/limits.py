"""What a model has no room for: ids beyond its embedding, and positions that it never learnt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from transformers import PreTrainedModel

from lit_ft.compat import remedies
from lit_ft.compat.protocols import IdsBeyond, KnowsExamples, TokenBatch
from lit_ft.compat.refusal import Refusal, Remedy
from lit_ft.models.sources import ModelSource

_SPARE_POSITIONS = 4  # rows ahead of position 0: OPT's table has two


@dataclass(frozen=True)
class Limits:
    """The sizes of a model's tables.

    Args:
        token_rows: The number of rows of the token embedding.
        learnt_positions: The number of positions, if each is a row that was learnt; None if the
            model has no such table.
        usual_positions: The number of positions that the model is made for; None if it does not
            say.
    """

    token_rows: int
    learnt_positions: int | None
    usual_positions: int | None

    def hold_batch(self, batch: TokenBatch) -> None:
        """Raise Refusal if a batch has a token id or a position that the model has not.

        Call it while the batch is on the CPU. On a GPU, torch would fail with a message that names
        neither.
        """
        ids = batch["input_ids"]
        if ids.numel() and (largest := int(ids.max())) >= self.token_rows:
            number = int((ids >= self.token_rows).sum())
            raise self._too_few_rows(IdsBeyond(number, largest), remedies.RESIZED_EMBEDDINGS)
        positions = batch.get("position_ids")
        self.hold_length(ids.shape[-1] if positions is None else int(positions.max()) + 1)

    def hold_length(self, tokens: int) -> None:
        """Raise Refusal if examples of this many tokens are longer than the learnt positions."""
        if self.learnt_positions is not None and tokens > self.learnt_positions:
            raise Refusal(
                f"An example has {tokens:,} tokens, and the model has learnt "
                f"{self.learnt_positions:,} positions",
                remedies.shorter_rows(self.learnt_positions),
            )

    def hold_examples(self, data: KnowsExamples, source: ModelSource) -> None:
        """Compare the examples of a data module with the tables of the model from `source`.

        A model without learnt positions runs on longer examples than it was made for. This gives a
        warning.

        Raises:
            Refusal: If the model has no row for a token or a position.
        """
        if (beyond := data.ids_beyond(self.token_rows)) is not None:
            resized = getattr(source, "resize_embeddings", False)
            remedy = remedies.MODELS_TOKENIZER if resized else remedies.RESIZED_EMBEDDINGS
            raise self._too_few_rows(beyond, remedy)
        longest = data.longest_example()
        self.hold_length(longest)
        if self.usual_positions is not None and longest > self.usual_positions:
            rank_zero_warn(
                f"Examples have up to {longest:,} tokens, and {source.name} is made for "
                f"{self.usual_positions:,} positions: it may have learnt nothing of later ones."
            )

    def _too_few_rows(self, beyond: IdsBeyond, remedy: Remedy) -> Refusal:
        token = "" if beyond.token is None else f", {beyond.token!r}"
        return Refusal(
            f"{beyond.number:,} token ids have no row in the embedding, which has "
            f"{self.token_rows:,}; the largest is {beyond.largest}{token}",
            remedy,
        )


def limits_of(model: PreTrainedModel) -> Limits:
    """Return the limits of a model, which may be on the meta device."""
    tokens: Any = model.get_input_embeddings()
    usual = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    is_learnt = usual is not None and any(
        isinstance(module, nn.Embedding)
        and module is not tokens
        and 0 <= module.num_embeddings - usual <= _SPARE_POSITIONS
        for module in model.modules()
    )
    return Limits(tokens.num_embeddings, usual if is_learnt else None, usual)
