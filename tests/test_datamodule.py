"""Batches: what the data module makes of rows, sources and streams."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from lit_ft.data.formats.alpaca import Alpaca
from lit_ft.datamodule import InstructionDataModule
from tests.support.datamodules import answers, ready, val_batches, write

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_share_the_rows_and_validate_none_twice(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, ranks: int
) -> None:
    data = ready(tokenizer, write(tmp_path / "my.jsonl", 101), val_fraction=0.3, batch_size=2)
    train, val, steps = [], [], set()
    for rank in range(ranks):
        data.trainer = SimpleNamespace(
            distributed_sampler_kwargs={"num_replicas": ranks, "rank": rank},
            accumulate_grad_batches=2,
            lightning_module=None,
        )
        train += answers(tokenizer, data.train_dataloader())
        val += answers(tokenizer, data.val_dataloader())
        steps.add((len(data.train_dataloader()), len(data.val_dataloader())))
    assert sorted(train + val) == sorted(f"q{i}" for i in range(101))
    assert len(steps) == 1


def test_packing_trains_on_the_same_examples_in_fewer_rows(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path / "my.jsonl", 60)
    plain = ready(tokenizer, path, batch_size=1, max_length=256)
    packed = ready(tokenizer, path, batch_size=1, max_length=256, packing=True)
    batches = list(packed.train_dataloader())
    assert len(batches) < len(plain.train_dataloader()) / 2
    found = answers(tokenizer, batches)
    assert sorted(found) == sorted(answers(tokenizer, plain.train_dataloader()))
    assert sum(int((batch["position_ids"] == 0).sum()) for batch in batches) >= len(found)
    assert all(batch["input_ids"].shape[1] <= 256 for batch in batches)
    assert all("position_ids" not in batch for batch in packed.val_dataloader())


def test_sources_mix_by_weight_until_all_are_exhausted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    sources = [
        {"path": write(tmp_path / "a.jsonl", 100, name="a"), "weight": 3},
        {"path": str(tmp_path / "b.jsonl"), "format": Alpaca(instruction="q", output="completion")},
    ]
    rows = [{"q": "q", "completion": f"b{i};"} for i in range(100)]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ready(tokenizer, None, sources=sources, val_fraction=0.1)
    train = Counter(answers(tokenizer, data.train_dataloader()))
    val = Counter(answers(tokenizer, val_batches(data)))
    assert set(train) | set(val) == {f"{name}{i}" for name in "ab" for i in range(100)}
    assert not set(train) & set(val)
    assert set(val.values()) == {1}
    share = sum(count for name, count in train.items() if name[0] == "a") / train.total()
    assert 0.65 < share < 0.85
    again = ready(tokenizer, None, sources=sources, val_fraction=0.1)
    assert Counter(answers(tokenizer, again.train_dataloader())) == train


def test_reports_count_what_is_cut_and_dropped(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "my.jsonl"
    rows = [{"prompt": "q", "completion": "a" * (200 if i % 4 == 0 else 3)} for i in range(100)]
    path.write_text("\n".join(map(json.dumps, rows)))
    cut = ready(tokenizer, str(path), max_length=100)
    assert sum(report.truncated for report in cut.reports.values()) == 25
    assert len(cut.train_examples) + len(cut.val_examples) == 100
    dropped = ready(tokenizer, str(path), max_length=100, overlong="drop")
    assert sum(report.dropped_overlong for report in dropped.reports.values()) == 25
    assert len(dropped.train_examples) + len(dropped.val_examples) == 75
    with pytest.raises(ValueError, match=r"\(0 examples.* as too long\)\. Raise max_length"):
        ready(tokenizer, str(path), max_length=5, overlong="drop")
    with pytest.raises(ValueError, match="dropped for lack of a target.*Raise max_length"):
        ready(tokenizer, str(path), max_length=5)


def test_sample_prompts_are_the_validation_examples_without_their_answers(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "my.jsonl"
    rows = [{"prompt": f"q{i}", "completion": f"a{i};"} for i in range(100)]
    path.write_text("\n".join(map(json.dumps, rows)))
    data = ready(tokenizer, str(path), val_fraction=0.2)
    prompts = data.sample_prompts(4)
    assert len(prompts) == 4
    held_out = answers(tokenizer, data.val_dataloader())
    everything = data.sample_prompts(99)
    contents = [turn["content"] for turns in everything for turn in turns]
    assert sorted(contents) == sorted(f"q{answer[1:]}" for answer in held_out)
    assert prompts == everything[:4]
    path.write_text('{"text": "once"}\n' * 9)
    assert ready(tokenizer, str(path)).sample_prompts(4) == []


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"val_batch_size": -1}, "val_batch_size must be at least 1"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"max_train_examples": 0}, "max_train_examples must be at least 1"),
        ({"max_val_examples": 0}, "max_val_examples must be at least 1"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
        ({"val_fraction": 0.0}, "val_fraction must be between 0 and 1"),
        ({"val_fraction": 1.0}, "val_fraction must be between 0 and 1"),
        ({"path": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"val_path": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"path": None}, "has no path"),
        ({"path": "a/b", "val_path": "a/b"}, "cannot be both trained and validated on"),
        ({"val_source_options": {"split": "test"}}, "needs val_path"),
        ({"sources": []}, "at least one source"),
        ({"sources": [{"path": "a/b", "weight": 0}]}, "weight of a/b must be positive, not 0"),
        ({"sources": [{"path": "a/b", "weight": True}]}, "weight of a/b must be positive, not Tru"),
        ({"sources": [{"path": "a/b", "weight": "2"}]}, "weight of a/b must be positive, not 2"),
        ({"sources": [{"path": 3}]}, "path of a source must be text, not 3"),
        ({"source_options": {"knd": "class"}}, r"does not take the options \['knd'\]"),
        ({"sources": [{"path": "a/b"}] * 2}, "a/b is among the sources twice"),
        ({"path": "a/b", "sources": [{"path": "c/d"}]}, "either sources or path"),
        ({"chat_template": "plane"}, "chat_template=plane"),
        ({"streaming": True}, "python-docstrings is not streamed"),
        ({"path": "a/b", "streaming": True}, "Set max_val_examples.*or give val_path"),
        (
            {"path": "a/b", "streaming": True, "max_val_examples": 1, "num_workers": 2},
            "Set num_workers=0",
        ),
    ],
)
def test_bad_arguments_are_refused_at_once(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        InstructionDataModule(**options)


def test_rows_that_are_trained_on_do_not_validate(tmp_path: Path, monkeypatch: Any) -> None:
    path = write(tmp_path / "my.jsonl", 9)
    monkeypatch.chdir(tmp_path)
    for source in ({"path": "my.jsonl", "weight": 2.0}, {"path": str(path), "format": "chat"}):
        with pytest.raises(ValueError, match="cannot be both trained and validated on"):
            InstructionDataModule(sources=[source], val_path="./my.jsonl")
    with pytest.raises(ValueError, match="among the sources twice"):
        InstructionDataModule(sources=[{"path": "my.jsonl"}, {"path": "./my.jsonl", "weight": 2}])


def test_the_template_that_is_trained_with_is_the_tokenizers_own(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    data = ready(tokenizer, write(tmp_path / "my.jsonl", 9), chat_template="plain")
    assert "Assistant:" in tokenizer.chat_template
    batch = next(iter(data.val_dataloader()))
    assert "User: " in tokenizer.decode(batch["input_ids"][0])


@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_trains_on_what_it_does_not_validate_on(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, packing: bool
) -> None:
    path = write(tmp_path / "my.jsonl", 100)
    data = ready(tokenizer, path, streaming=True, max_val_examples=7, packing=packing)
    assert answers(tokenizer, data.val_dataloader()) and len(data.val_examples) == 7
    train = answers(tokenizer, data.train_dataloader())
    assert sorted(train) == sorted(f"q{i}" for i in range(7, 100))
    assert data.reports["train"].examples == 93
    val_path = write(tmp_path / "val.jsonl", 5, name="v")
    data = ready(tokenizer, path, streaming=True, val_path=val_path, packing=packing)
    assert len(answers(tokenizer, data.train_dataloader())) == 100
    assert sorted(answers(tokenizer, data.val_dataloader())) == [f"v{i}" for i in range(5)]


def test_streams_mix_too(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    sources = [{"path": write(tmp_path / f"{n}.jsonl", 40, name=n)} for n in "ab"]
    data = ready(tokenizer, None, sources=sources, streaming=True, max_val_examples=10)
    train = set(answers(tokenizer, data.train_dataloader()))
    val = answers(tokenizer, val_batches(data))
    assert sorted(val) == sorted(f"{n}{i}" for n in "ab" for i in range(5))
    assert train == {f"{n}{i}" for n in "ab" for i in range(5, 40)}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_loader_goes_on_where_its_state_was_taken(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, streaming: bool
) -> None:
    path = write(tmp_path / "my.jsonl", 60)
    options = {"streaming": True, "max_val_examples": 5} if streaming else {}
    loader = ready(tokenizer, path, **options).train_dataloader()
    batches = iter(loader)
    next(batches)
    state = loader.state_dict()
    rest = list(batches)
    resumed = ready(tokenizer, path, **options).train_dataloader()
    resumed.load_state_dict(state)
    for one, two in zip(resumed, rest, strict=True):
        assert one.pop("origins") == two.pop("origins")
        torch.testing.assert_close(one, two, rtol=0, atol=0)
