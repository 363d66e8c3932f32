"""Check whether a model keeps the examples of a packed row apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_ft.loss.chunked import unwrap_peft


@torch.no_grad()
def keeps_packed_examples_apart(
    model: nn.Module, input_ids: Tensor, position_ids: Tensor, *, rows: int = 1
) -> bool:
    """Return whether the second example of a packed row is independent of the first.

    transformers' attention masks and variable-length kernels find where examples begin by position
    ids that restart at zero. A model that ignores these restarts would let each example attend to
    the examples before it.

    Args:
        model: The causal LM, with or without an adapter.
        input_ids: The token ids [T] of one packed row.
        position_ids: The position ids [T] of the row, which restart at zero in each example.
        rows: The number of rows in the batches to come. The check repeats the row this many times,
            because flash attention's kernels find examples only in a batch of one row.

    Returns:
        True if the hidden states of the second example do not change with the tokens of the first,
        or if the row holds only one example.
    """
    starts = (position_ids == 0).nonzero().flatten().tolist()
    if len(starts) < 2:
        return True
    begin, end = starts[1], (starts[2] if len(starts) > 2 else len(input_ids))
    causal_lm = unwrap_peft(model)
    changed = input_ids[:end].clone()
    changed[:begin] = (changed[:begin] + 1) % causal_lm.config.get_text_config().vocab_size
    was_training = model.training
    model.eval()
    try:
        # One version at a time: rows of one batch could be computed by different kernels.
        before, after = (
            causal_lm.base_model(
                input_ids=row.expand(rows, -1),
                position_ids=position_ids[:end].expand(rows, -1),
                use_cache=False,
            ).last_hidden_state[0, begin:end]
            for row in (input_ids[:end], changed)
        )
    finally:
        model.train(was_training)
    return torch.allclose(before, after, rtol=1e-3, atol=1e-3)
