from __future__ import annotations

import inspect
import json
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerFast

from lit_ft.data import docstrings
from lit_ft.data.formats.alpaca import Alpaca
from lit_ft.datamodule import InstructionDataModule

CONF = Path(__file__).parent.parent / "conf"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_FT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in for the standard library: thirty modules of two functions and a class each."""
    (tmp_path / "library").mkdir()
    for name in range(30):
        code = "".join(f'def f{i}():\n    "Function {name} {i}."\n' for i in range(2))
        code += f'class A:\n    "Class {name}."\n'
        (tmp_path / "library" / f"m{name}.py").write_text(code)
    monkeypatch.setattr(docstrings.sysconfig, "get_path", lambda _: str(tmp_path / "library"))
    return tmp_path / "library"


def write(path: Path, count: int, *, name: str = "q", length: int = 3) -> str:
    """Write chats whose answers tell them apart: q0, q1, ... of differing lengths."""
    rows = [{"prompt": "hi" * (i % length), "completion": f"{name}{i};"} for i in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def ready(tokenizer: PreTrainedTokenizerFast, path: str | None, **options: Any) -> Any:
    data = InstructionDataModule(path, tokenizer=tokenizer, **options)
    data.prepare_data()
    data.setup("fit")
    return data


def answers(tokenizer: PreTrainedTokenizerFast, batches: Any) -> list[str]:
    """Decode every answer that a loader's labels hold."""
    found = ""
    for batch in batches:
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            found += tokenizer.decode(ids[labels != -100])
    return found.replace("<|im_end|>", "").split(";")[:-1]


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
    with pytest.raises(ValueError, match="nothing is left for .*give more data"):
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
    val = Counter(answers(tokenizer, data.val_dataloader()))
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
    dropped = ready(tokenizer, str(path), max_length=100, drop_overlong=True)
    assert sum(report.dropped_overlong for report in dropped.reports.values()) == 25
    assert len(dropped.train_examples) + len(dropped.val_examples) == 75
    with pytest.raises(ValueError, match=r"\(0 examples.* as too long\): raise data.max"):
        ready(tokenizer, str(path), max_length=5, drop_overlong=True)
    with pytest.raises(ValueError, match="dropped for want of a target.*raise data.max_length"):
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
        ({"sources": [{"path": "a/b"}] * 2}, "a/b is among the sources twice"),
        ({"path": "a/b", "sources": [{"path": "c/d"}]}, "either sources or path"),
        ({"chat_template": "plane"}, "chat_template=plane"),
        ({"streaming": True}, "python-docstrings is not streamed"),
        ({"path": "a/b", "streaming": True}, "set data.max_val_examples.*or data.val_path"),
        (
            {"path": "a/b", "streaming": True, "max_val_examples": 1, "num_workers": 2},
            "data.num_workers=0",
        ),
    ],
)
def test_bad_arguments_are_refused_at_once(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        InstructionDataModule(**options)


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
    val = answers(tokenizer, data.val_dataloader())
    assert sorted(val) == sorted(f"{n}{i}" for n in "ab" for i in range(5))
    assert train == {f"{n}{i}" for n in "ab" for i in range(5, 40)}


@pytest.mark.timeout(60)
def test_a_stream_of_no_example_ends_the_run(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path / "my.jsonl", 40)
    trainer = quiet_trainer(max_steps=5)
    data = InstructionDataModule(path, streaming=True, max_val_examples=40)
    with pytest.raises(ValueError, match="has 40 rows, and the first 40 are validated on"):
        trainer.fit(Recorder(tokenizer), datamodule=data)
    (tmp_path / "val.jsonl").write_text('{"text": "short"}')
    val_path = str(tmp_path / "val.jsonl")
    data = InstructionDataModule(
        path, streaming=True, val_path=val_path, max_length=10, drop_overlong=True
    )
    with pytest.raises(
        ValueError, match="nothing is left for training on .*40 dropped as too long"
    ):
        trainer.fit(Recorder(tokenizer), datamodule=data)


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
        torch.testing.assert_close(one, two, rtol=0, atol=0)


class Recorder(LightningModule):
    """Keeps the batches that a trainer gives it."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast | None) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches: dict[str, list[Any]] = {"train": [], "val": []}

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        self.batches["train"].append(batch)
        return self.weight * batch["num_targets"]

    def validation_step(self, batch: Any, _: int) -> None:
        self.batches["val"].append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def quiet_trainer(**options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


def test_a_trainer_feeds_a_module_whose_tokenizer_it_takes(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    data = InstructionDataModule(write(tmp_path / "my.jsonl", 50), batch_size=3)
    module = Recorder(tokenizer)
    quiet_trainer(max_epochs=2, accumulate_grad_batches=2).fit(module, datamodule=data)
    epochs = len(module.batches["train"]) // 2
    first, second = module.batches["train"][:epochs], module.batches["train"][epochs:]
    orders = answers(tokenizer, first), answers(tokenizer, second)
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]
    assert len(orders[0]) == len(data.train_examples)
    val = Counter(answers(tokenizer, module.batches["val"]))
    assert set(val.values()) == {2}
    assert len(val) == len(data.val_examples)


def test_a_trainer_is_refused_what_cannot_work(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path / "my.jsonl", 50)
    with pytest.raises(MisconfigurationException, match="needs a tokenizer"):
        quiet_trainer(max_epochs=1).fit(Recorder(None), datamodule=InstructionDataModule(path))
    stream = InstructionDataModule(path, streaming=True, max_val_examples=5)
    with pytest.raises(MisconfigurationException, match="set trainer.max_steps"):
        quiet_trainer(max_epochs=1).fit(Recorder(tokenizer), datamodule=stream)
    module = Recorder(tokenizer)
    quiet_trainer(max_steps=30).fit(module, datamodule=stream)
    assert len(module.batches["train"]) == 30  # passes over the stream follow each other


@pytest.mark.parametrize("choice", sorted(file.stem for file in (CONF / "data").glob("*.yaml")))
@pytest.mark.parametrize(
    "form", sorted(file.stem for file in (CONF / "data" / "format").glob("*.yaml"))
)
def test_every_choice_of_configuration_makes_batches(
    tmp_path: Path, library: Path, tokenizer: PreTrainedTokenizerFast, choice: str, form: str
) -> None:
    (tmp_path / "train.yaml").write_text("defaults: [data: docstrings, _self_]\nseed: 3\n")
    overrides = [f"data={choice}", f"data/format={form}"]
    if choice == "file":
        overrides.append(f"data.path={write(tmp_path / 'my.jsonl', 20)}")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        config = compose(
            "train", [*overrides, f"hydra.searchpath=[file://{CONF}]"], return_hydra_config=False
        )
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    names = inspect.signature(InstructionDataModule).parameters
    assert set(plain["data"]) - {"_target_"} <= set(names)
    data = instantiate(plain["data"], tokenizer=tokenizer, _convert_="all")
    assert data.seed == 3
    if form not in ("auto", "prompt_completion"):
        with pytest.raises(ValueError, match="is missing"):
            data.prepare_data()
        return
    data.prepare_data()
    data.setup("fit")
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert all(batch["num_targets"] > 0 for batch in islice(loader, 3))


def test_data_path_alone_switches_the_default_to_a_file(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "train.yaml").write_text("defaults: [data: docstrings, _self_]\nseed: 3\n")
    (tmp_path / "my.jsonl").write_text('{"instruction": "q", "output": "a"}\n' * 9)
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        config = compose(
            "train", [f"data.path={tmp_path / 'my.jsonl'}", f"hydra.searchpath=[file://{CONF}]"]
        )
    data = instantiate(config["data"], tokenizer=tokenizer, _convert_="all")
    data.setup("fit")
    assert len(data.train_examples) + len(data.val_examples) == 9
