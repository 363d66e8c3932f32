"""How many chats does lit_ft encode per second, compared with trl's SFTTrainer?

    python benchmarks/encoding.py
    python benchmarks/encoding.py --rows 5000 --rounds 5

Both sides read the same file of JSON lines, apply the same chat template, tokenise with SmolLM2's
tokenizer, mark the answers as targets and write a table. A chat has one to three prompts and
answers, which are definitions and docstrings from the embedded data. trl prepares its data in the
constructor of SFTTrainer. It uses one process by default, and two with `dataset_num_proc=2`.

To learn only answers (`assistant_only_loss`), trl needs a template with `{% generation %}` tags. So
both sides use the template that trl ships for Qwen2.5. Its tags also enclose the two line breaks
around each answer. trl learns them, and lit_ft does not. The rows are cut into parts, and the sides
take turns part by part.

Results: results/encoding.json.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import torch
from pyarrow import compute
from rich.console import Console
from rich.progress import track
from rich.table import Table
from support.arguments import script_parser
from support.results import this_run, write_json
from support.smollm2 import SMOLLM2
from support.timing import median_ratio, spread
from trl import SFTConfig, SFTTrainer

from lit_ft.data.docstrings import Docstrings
from lit_ft.data.encoding import Encoder
from lit_ft.data.sources import open_source
from lit_ft.data.tables import column, drop_unusable, encode_source
from lit_ft.loss import IGNORE_INDEX
from lit_ft.models import FromConfig

MAX_LENGTH = 2048


def main() -> None:
    """Measure, print, and write the results."""
    parser = script_parser(__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument(
        "--rounds", type=int, default=10, help="number of parts; the sides take turns at each"
    )
    options = parser.parse_args()
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        parts = write_chats(Path(folder), options.rows // options.rounds, options.rounds)
        record = {**this_run(), "rows": options.rows, "sides": measure(parts)}
    shown = Table("side", "rows/s", "range", "lit_ft is faster by")
    for name, side in record["sides"].items():
        speed = side["rows_per_second"]
        between = f"{speed['min']:,.0f}-{speed['max']:,.0f}"
        shown.add_row(name, f"{speed['median']:,.0f}", between, f"{side['lit_ft_ratio']:.2f}")
    Console().print(shown)
    write_json(options.output / "encoding.json", record)


def write_chats(folder: Path, num_rows: int, num_files: int) -> list[Path]:
    """Write files of chats of one to three turns, each a function and its docstring."""
    pairs = [(row.fields["prompt"], row.fields["completion"]) for row in Docstrings().rows()]
    draw = random.Random(0)
    written = []
    for number in range(num_files):
        written.append(folder / f"chats_{number}.jsonl")
        with written[-1].open("w", encoding="utf-8") as stream:
            for _ in range(num_rows):
                messages = []
                for prompt, completion in draw.sample(pairs, draw.randint(1, 3)):
                    messages.append({"role": "user", "content": prompt})
                    messages.append({"role": "assistant", "content": completion})
                stream.write(json.dumps({"messages": messages}) + "\n")
    return written


def measure(parts: list[Path]) -> dict[str, Any]:
    """Return the speed of each side, and that of lit_ft relative to it, part by part."""
    sides: dict[str, Callable[[Path, Path], tuple[int, int]]] = {
        "lit_ft": with_lit_ft,
        "trl": partial(with_trl, processes=None),
        "trl, 2 processes": partial(with_trl, processes=2),
    }
    tokenizer()  # made from its GGUF file where the cache lacks it
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    counts: dict[str, list[tuple[int, int]]] = {name: [] for name in sides}
    for part in track(parts, console=Console(stderr=True)):
        with part.open("rb") as stream:
            num_rows = sum(1 for _ in stream)
        for name, encode in sides.items():
            with tempfile.TemporaryDirectory() as scratch:
                began = time.perf_counter()
                counts[name].append(encode(part, Path(scratch)))
                speeds[name].append(num_rows / (time.perf_counter() - began))
    return {
        name: {
            "rows_per_second": spread(speeds[name]),
            "lit_ft_ratio": median_ratio(speeds["lit_ft"], speeds[name]),
            "tokens": sum(tokens for tokens, _ in counts[name]),
            "targets": sum(targets for _, targets in counts[name]),
        }
        for name in sides
    }


def tokenizer() -> Any:
    """Return SmolLM2's tokenizer with a template that trl can train on."""
    loaded = SMOLLM2.load_tokenizer()
    template = files("trl") / "chat_templates" / "qwen2_5_training.jinja"
    loaded.chat_template = template.read_text(encoding="utf-8")
    return loaded


def with_lit_ft(file: Path, scratch: Path) -> tuple[int, int]:
    """Encode the file as `InstructionDataModule` does; return the counts of tokens and targets."""
    encoder = Encoder(tokenizer(), MAX_LENGTH, overlong="cut")
    with patch.dict(os.environ, LIT_FT_CACHE=str(scratch)):
        table = drop_unusable(encode_source(open_source(str(file)), None, encoder))
    return int(column(table, "num_tokens").sum()), int(column(table, "num_targets").sum())


def with_trl(file: Path, scratch: Path, *, processes: int | None) -> tuple[int, int]:
    """Encode the file as SFTTrainer does; return the counts of tokens and targets."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    shape = {**sizes, "num_hidden_layers": 1, "vocab_size": 49152}
    trainer = SFTTrainer(
        model=FromConfig("llama", shape).load_model(torch.float32),
        args=SFTConfig(
            output_dir=str(scratch / "run"),
            max_length=MAX_LENGTH,
            assistant_only_loss=True,
            dataset_num_proc=processes,
            report_to=[],
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=datasets.load_dataset(
            "json", data_files=str(file), split="train", cache_dir=str(scratch)
        ),
        processing_class=tokenizer(),
    )
    tokens, targets = 0, 0
    for batch in trainer.train_dataset.with_format("arrow").iter(batch_size=1000):
        labels = batch["labels"].combine_chunks().flatten()
        tokens += len(labels)
        targets += compute.sum(compute.not_equal(labels, IGNORE_INDEX)).as_py()
    return tokens, targets


if __name__ == "__main__":
    main()
