"""Which rows train and which validate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lit_ft.data import docstrings
from tests.support.datamodules import answers, ready, write

pytestmark = pytest.mark.usefixtures("own_cache")


def test_each_row_is_on_one_side_and_each_side_complete(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    data = ready(tokenizer, write(tmp_path / "my.jsonl", 200), val_fraction=0.2, batch_size=3)
    train = answers(tokenizer, data.train_dataloader())
    val = answers(tokenizer, data.val_dataloader())
    assert sorted(train + val) == sorted(f"q{i}" for i in range(200))
    assert 20 < len(val) < 60
    assert (len(data.train_examples), len(data.val_examples)) == (len(train), len(val))
    assert (data.reports["train"].examples, data.reports["val"].examples) == (len(train), len(val))


def test_no_seed_and_no_new_row_moves_a_row_to_the_other_side(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    def held_out(count: int, **options: Any) -> set[str]:
        data = ready(tokenizer, write(tmp_path / "my.jsonl", count), **options)
        return set(answers(tokenizer, data.val_dataloader()))

    first = held_out(150, seed=1)
    assert held_out(150, seed=2) == first
    more = held_out(200)
    assert {name for name in more if int(name[1:]) < 150} == first
    assert more > first
    few = held_out(200, max_val_examples=3)
    assert len(few) == 3
    assert few < more
    assert held_out(200, max_val_examples=3, seed=5) == few


def test_a_part_of_the_training_rows_is_the_same_with_every_seed(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    def trained_on(**options: Any) -> set[str]:
        data = ready(tokenizer, write(tmp_path / "my.jsonl", 100), **options)
        return set(answers(tokenizer, data.train_dataloader()))

    few = trained_on(max_train_examples=5)
    assert len(few) == 5 and few < trained_on()
    assert trained_on(max_train_examples=5, seed=3) == few
    streamed = trained_on(max_train_examples=5, streaming=True, max_val_examples=7)
    assert streamed == {f"q{i}" for i in range(7, 12)}


@pytest.mark.parametrize("rows", [2, 3, 5])
@pytest.mark.parametrize("val_fraction", [0.001, 0.999])
def test_neither_side_is_empty_however_few_rows_there_are(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, rows: int, val_fraction: float
) -> None:
    data = ready(tokenizer, write(tmp_path / "my.jsonl", rows), val_fraction=val_fraction)
    assert len(data.train_examples) >= 1
    assert len(data.val_examples) >= 1
    assert len(data.train_examples) + len(data.val_examples) == rows


def test_one_row_alone_is_not_enough(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="nothing is left for .*Give more data"):
        ready(tokenizer, write(tmp_path / "my.jsonl", 1))


def test_a_validation_file_leaves_all_rows_to_training(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    val_path = write(tmp_path / "val.jsonl", 5, name="v")
    data = ready(tokenizer, write(tmp_path / "my.jsonl", 20), val_path=val_path)
    train = answers(tokenizer, data.train_dataloader())
    assert sorted(train) == sorted(f"q{i}" for i in range(20))
    assert sorted(answers(tokenizer, data.val_dataloader())) == [f"v{i}" for i in range(5)]


def test_the_embedded_data_keeps_its_own_split(
    library: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    data = ready(tokenizer, "python-docstrings", val_fraction=0.5)
    for table, side in ((data.train_examples, False), (data.val_examples, True)):
        modules = {origin.split(":")[0] for origin in table["origin"][:]}
        assert modules == {
            file.name for file in library.iterdir() if docstrings.in_validation(file.name) == side
        }
