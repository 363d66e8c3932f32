"""The data module under a Trainer, and as the configuration makes it."""

from __future__ import annotations

import inspect
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerFast

from lit_ft.datamodule import InstructionDataModule
from tests.support.datamodules import answers, val_batches, write
from tests.support.tiny_module import quiet_trainer

CONF = Path(__file__).parent.parent / "conf"

pytestmark = pytest.mark.usefixtures("own_cache")


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
    with pytest.raises(MisconfigurationException, match="max_steps"):
        quiet_trainer(max_epochs=1).fit(Recorder(tokenizer), datamodule=stream)
    module = Recorder(tokenizer)
    quiet_trainer(max_steps=30).fit(module, datamodule=stream)
    assert len(module.batches["train"]) == 30  # passes over the stream follow each other


def test_a_stream_of_no_example_ends_the_run(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write(tmp_path / "my.jsonl", 40)
    trainer = quiet_trainer(max_steps=5)
    data = InstructionDataModule(path, streaming=True, max_val_examples=40)
    with pytest.raises(ValueError, match="has 40 rows, and the first 40 are used for validation"):
        trainer.fit(Recorder(tokenizer), datamodule=data)
    (tmp_path / "val.jsonl").write_text('{"text": "short"}')
    val_path = str(tmp_path / "val.jsonl")
    data = InstructionDataModule(
        path, streaming=True, val_path=val_path, max_length=10, overlong="drop"
    )
    with pytest.raises(
        ValueError, match="nothing is left for training on .*40 dropped as too long"
    ):
        trainer.fit(Recorder(tokenizer), datamodule=data)


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
    for loader in (data.train_dataloader(), val_batches(data)):
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
