"""Read the data of a configuration as a model sees it, and count its rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from transformers import PreTrainedTokenizerBase

from lit_ft.compat.refusal import message_on_command_line
from lit_ft.data.encoded import EncodedRow
from lit_ft.data.encoding import Encoder, load_chat_template
from lit_ft.data.sources import parse
from lit_ft.data.splits import WeightedSource, source_choices, weighted_sources
from lit_ft.data.survey import Survey
from lit_ft.storage.json_file import read_json

DATAMODULE = "lit_ft.InstructionDataModule"


@dataclass(frozen=True)
class Speed:
    """The measured speed of an earlier run.

    Args:
        tokens_per_second: The number of tokens that the run trained on per second.
        run_dir: The folder of the run.
    """

    tokens_per_second: float
    run_dir: Path


def settings_of_data(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the data.

    Raises:
        ValueError: If the data is not that of `DATAMODULE`, whose settings are known.
    """
    if (target := config["data"].get("_target_")) != DATAMODULE:
        raise ValueError(f"data._target_={target}: only the data of {DATAMODULE} is known.")
    return {name: value for name, value in config["data"].items() if name != "_target_"}


class Preview:
    """The data that a configuration names, encoded as for training.

    Bad rows are kept with their errors, whatever `data.bad_rows` is.

    Args:
        config: The resolved configuration of `train.py`. It must name only trusted classes.

    Raises:
        ValueError: If the data or the tokenizer does not exist, or if a setting of the data is
            wrong.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.settings = instantiate(
            {"_target_": "builtins.dict", **settings_of_data(config)}, _convert_="all"
        )
        self.micro_batches: int = config["trainer"].get("accumulate_grad_batches", 1)
        self.model = config["model"]
        self.tokenizer = self._load_tokenizer()
        encoding = {
            one.name: self.settings[one.name]
            for one in fields(Encoder)
            if one.name in self.settings
        }
        self.encoder = Encoder(
            self.tokenizer, **{**encoding, "bad_rows": "skip", "worded": message_on_command_line}
        )
        format = self.settings.get("format")
        choices = source_choices(
            self.settings.get("path"),
            self.settings.get("sources"),
            self.settings.get("source_options"),
        )
        streaming = bool(self.settings.get("streaming"))
        self.sources = weighted_sources(choices, format=format, streaming=streaming)
        if val_path := self.settings.get("val_path"):
            own = {"path": val_path, **(self.settings.get("val_source_options") or {})}
            self.sources += weighted_sources([own], format=format)

    def rows(self, source: WeightedSource) -> Iterator[EncodedRow]:
        """Yield the encoded rows of a source, in the order of the source."""
        return self.encoder(parse(source.source, source.format, keep_errors=True))

    def survey(self, source: WeightedSource, rows: list[EncodedRow], *, is_whole: bool) -> Survey:
        """Count the encoded rows of a source.

        Args:
            source: The source of the rows.
            rows: The encoded rows to count.
            is_whole: Whether `rows` are all rows of the source.
        """
        count = getattr(source.source, "num_rows", None)
        read = len({row.origin for row in rows})
        total = read if is_whole else (count() if count else None)
        return Survey.of(rows, total_rows=total)

    def last_speed(self, runs: Path) -> Speed | None:
        """Return the speed of the newest run of the same model; None if no run has measured one.

        Args:
            runs: The folder that holds the folders of runs. The jobs of a sweep are one folder
                deeper.
        """
        found = chain(runs.glob("*/summary.json"), runs.glob("*/*/summary.json"))
        for file in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
            try:
                summary = read_json(file)
                speed, model = summary["tokens_per_second"], summary["config"]["model"]
            except (OSError, ValueError, LookupError, TypeError):
                continue  # damaged, or written by another program
            if speed and model == self.model:
                return Speed(speed, file.parent)
        return None

    def _load_tokenizer(self) -> PreTrainedTokenizerBase:
        source = instantiate(self.model, _convert_="all")
        source.check()
        tokenizer = source.load_tokenizer()
        if tokenizer is None:
            raise ValueError(f"The model {source.name} has no tokenizer, so it has no preview.")
        if template := self.settings.get("chat_template"):
            tokenizer.chat_template = load_chat_template(template)
        loaded: PreTrainedTokenizerBase = tokenizer
        return loaded
