"""What a model has no room for is known before it runs."""

import pytest
import torch

from lit_ft.compat.refusal import Refusal
from lit_ft.models import FromConfig
from lit_ft.models.limits import Limits, limits_of
from tests.support.tiny_model import tiny_model


@pytest.mark.parametrize(
    ("model_type", "config", "learnt"),
    [
        ("gpt2", {"n_positions": 24}, 24),
        ("opt", {"max_position_embeddings": 24, "word_embed_proj_dim": 64}, 24),  # 26 rows
        ("gpt_bigcode", {"n_positions": 24}, 24),
        ("llama", {"max_position_embeddings": 24}, None),
        ("bloom", {}, None),
    ],
)
def test_learnt_positions_are_those_that_the_model_can_take(model_type, config, learnt):
    """The truth is what the model does with one token more."""
    model = tiny_model(model_type, **config)
    limits = limits_of(model)
    assert (limits.token_rows, limits.learnt_positions) == (300, learnt)
    model(torch.ones(1, 24, dtype=torch.long))
    too_long = {"input_ids": torch.ones(1, 25, dtype=torch.long)}
    if learnt is None:
        model(**too_long)
        limits.hold_batch(too_long)
        return
    with pytest.raises(IndexError):
        model(**too_long)
    with pytest.raises(Refusal, match="has 25 tokens, and the model has learnt 24 positions"):
        limits.hold_batch(too_long)


def test_positions_that_restart_may_be_more_than_were_learnt():
    limits = Limits(300, learnt_positions=24, usual_positions=24)
    ids = torch.ones(1, 40, dtype=torch.long)
    limits.hold_batch({"input_ids": ids, "position_ids": torch.arange(40)[None] % 20})
    with pytest.raises(Refusal, match="has 25 tokens"):
        limits.hold_batch({"input_ids": ids, "position_ids": torch.arange(40)[None] % 25})


def test_a_batch_with_ids_beyond_the_embedding_is_refused():
    limits = limits_of(tiny_model("llama"))
    limits.hold_batch({"input_ids": torch.tensor([[1, 299]])})
    with pytest.raises(Refusal, match="2 token ids have no row .* has 300; the largest is 307"):
        limits.hold_batch({"input_ids": torch.tensor([[1, 307, 300]])})


class Examples:
    def __init__(self, longest):
        self.longest = longest

    def ids_beyond(self, rows):
        return None

    def longest_example(self):
        return self.longest


@pytest.mark.parametrize(("longest", "warned"), [(24, False), (25, True)])
def test_rotary_positions_beyond_those_of_the_model_give_a_warning(longest, warned, recwarn):
    limits = limits_of(tiny_model("llama", max_position_embeddings=24))
    limits.hold_examples(Examples(longest), FromConfig("llama", name="mine"))
    told = [str(one.message) for one in recwarn if "is made for" in str(one.message)]
    assert bool(told) == warned
    assert all("25 tokens, and mine is made for 24 positions" in text for text in told)
    with pytest.raises(Refusal, match=r"25 tokens.*Set max_length=24"):
        Limits(300, learnt_positions=24, usual_positions=24).hold_examples(Examples(25), None)
