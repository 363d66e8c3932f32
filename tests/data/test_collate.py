import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from lit_ft.data.collate import Collator

# A busy machine is no failure of a law.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

PAD = 7


def example(ids, labels=None):
    return {"input_ids": ids, "labels": ids if labels is None else labels}


examples = st.lists(
    st.tuples(st.integers(1, 99), st.sampled_from([-100, 5])), min_size=1, max_size=12
).map(lambda tokens: example([t for t, _ in tokens], [label for _, label in tokens]))
single_rows = st.lists(st.tuples(examples).map(list), min_size=1, max_size=5)
rows_of_many = st.lists(st.lists(examples, min_size=1, max_size=4), min_size=1, max_size=5)
any_rows = single_rows | rows_of_many


def row_lengths(rows):
    return [sum(len(e["input_ids"]) for e in row) for row in rows]


@given(any_rows, st.booleans(), st.integers(1, 8))
def test_every_token_lands_in_place_and_the_rest_is_padding(rows, packed, multiple):
    batch = Collator(PAD, packed=packed, pad_to_multiple_of=multiple)(rows)
    width = -(-max(row_lengths(rows)) // multiple) * multiple
    assert batch["input_ids"].shape == batch["labels"].shape == (len(rows), width)
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64
    for row, ids, labels in zip(
        rows, batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True
    ):
        expected_ids = [t for e in row for t in e["input_ids"]]
        expected_labels = [t for e in row for t in [-100, *e["labels"][1:]]]
        padding = width - len(expected_ids)
        assert ids == expected_ids + [PAD] * padding
        assert labels == expected_labels + [-100] * padding


@given(any_rows, st.booleans())
def test_counts_are_python_ints_of_tokens_and_targets(rows, packed):
    batch = Collator(PAD, packed=packed, pad_to_multiple_of=4)(rows)
    assert type(batch["num_tokens"]) is type(batch["num_targets"]) is int
    assert batch["num_tokens"] == sum(row_lengths(rows))
    assert batch["num_targets"] == int((batch["labels"][:, 1:] != -100).sum())


@given(rows_of_many)
def test_position_ids_restart_at_every_example_and_at_the_padding(rows):
    batch = Collator(PAD, packed=True, pad_to_multiple_of=4)(rows)
    width = batch["input_ids"].shape[1]
    for row, length, positions in zip(
        rows, row_lengths(rows), batch["position_ids"].tolist(), strict=True
    ):
        expected = [p for e in row for p in range(len(e["input_ids"]))]
        assert positions == expected + list(range(width - length))


@given(any_rows, st.booleans())
def test_masks_follow_the_contract(rows, packed):
    batch = Collator(PAD, packed=packed)(rows)
    is_packed = packed or any(len(row) > 1 for row in rows)
    has_padding = len(set(row_lengths(rows))) > 1
    assert ("position_ids" in batch) == is_packed
    assert ("attention_mask" in batch) == (not is_packed and has_padding)
    if "attention_mask" in batch:
        assert batch["attention_mask"].dtype == torch.int64
        assert batch["attention_mask"].sum(dim=1).tolist() == row_lengths(rows)
        assert bool((batch["attention_mask"].diff(dim=1) <= 0).all())


def test_inputs_are_left_alone():
    row = [example([1, 2, 3])]
    Collator(PAD)([row])
    assert row == [example([1, 2, 3])]


def test_labels_must_match_the_tokens():
    with pytest.raises(ValueError, match="3 input_ids and 2 labels"):
        Collator(PAD)([[example([1, 2, 3], [1, 2]), example([1, 2], [1, 2, 3])]])


def test_pad_to_multiple_of_must_be_positive():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Collator(PAD, pad_to_multiple_of=0)


# ---- in a model


@pytest.fixture(scope="module", params=["eager", "sdpa"])
def model(request):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=request.param,
    )
    return LlamaForCausalLM(config).eval()


def hidden_states(model, batch):
    inputs = {
        k: v for k, v in batch.items() if k in {"input_ids", "attention_mask", "position_ids"}
    }
    with torch.no_grad():
        return model.model(**inputs, use_cache=False).last_hidden_state


def random_rows():
    rng = np.random.default_rng(0)
    lengths = [[5, 1, 9], [7, 4], [12]]
    return [[example(rng.integers(1, 100, n).tolist()) for n in row] for row in lengths]


def alone_and_together(model, rows, batch):
    """Yield the hidden states of each example alone, and in the batch."""
    for row, states in zip(rows, hidden_states(model, batch), strict=True):
        start = 0
        for each in row:
            alone = hidden_states(model, {"input_ids": torch.tensor([each["input_ids"]])})[0]
            yield alone, states[start : start + len(alone)]
            start += len(alone)


@pytest.mark.parametrize("pad_to_multiple_of", [1, 8])
def test_packed_examples_do_not_see_each_other(model, pad_to_multiple_of):
    rows = random_rows()
    batch = Collator(PAD, pad_to_multiple_of=pad_to_multiple_of)(rows)
    for alone, together in alone_and_together(model, rows, batch):
        assert_close(together, alone, atol=1e-5, rtol=0)


def test_the_leak_test_sees_a_leak(model):
    rows = random_rows()
    batch = Collator(PAD)(rows)
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    gaps = [
        (alone - together).abs().max() for alone, together in alone_and_together(model, rows, batch)
    ]
    assert gaps[0] < 1e-5  # nothing lies before the first example of a row
    assert gaps[1] > 1e-2
    assert gaps[2] > 1e-2


def test_padded_examples_equal_those_alone(model):
    rows = [[each] for row in random_rows() for each in row]
    for alone, together in alone_and_together(model, rows, Collator(PAD)(rows)):
        assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rows", [[], [[]]])
def test_no_rows_make_a_dummy_that_a_model_can_run(model, packed, rows):
    batch = Collator(PAD, packed=packed, pad_to_multiple_of=4)(rows)
    assert batch["input_ids"].shape == batch["labels"].shape == (1, 4)
    assert batch["num_tokens"] == batch["num_targets"] == 0
    assert (batch["labels"] == -100).all()
    assert ("position_ids" in batch) == packed
    assert "attention_mask" not in batch
    assert hidden_states(model, batch).isfinite().all()


def test_a_packed_batch_names_all_its_rows():
    rows = [[{**example([1, 2]), "origin": f"a.jsonl:{n}"} for n in row] for row in ([1, 3], [2])]
    assert Collator(PAD)(rows)["origins"] == ["a.jsonl:1", "a.jsonl:3", "a.jsonl:2"]
    assert "origins" not in Collator(PAD)([[example([1, 2])]])
