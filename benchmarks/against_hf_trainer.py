"""How fast does lit_ft train, compared with transformers' Trainer on the same work?

    python benchmarks/against_hf_trainer.py
    python benchmarks/against_hf_trainer.py --rounds 3 --steps 6

SmolLM2-135M trains whole on the embedded data with fused AdamW, in three ways that take turns in
one process:

- lit_ft: CausalLMModule and InstructionDataModule under Lightning's Trainer.
- Trainer, same batches: transformers' Trainer with its own loss and a padding collator. It reads
  the same examples in the order of lit_ft's sampler, so every batch is the same.
- Trainer, random batches: the same with the Trainer's own random order.

All three use the same weights, dtype, batch size, learning rate, decay, clipping and threads. One
clock times them: from the end of the last skipped step to the end of the last step, waiting for
data included. Padding does not count as tokens. The first two must have equal losses at every step,
which shows that they do the same work; otherwise the run fails.

Results: results/against_hf_trainer.json, and for people results/against_hf_trainer.md.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
import transformers
from datasets import Dataset
from lightning.pytorch import Callback, LightningModule, Trainer
from support.arguments import script_parser
from support.hf_trainer_report import LIT_FT, RANDOM, SAME, as_markdown, show
from support.in_order import examples_in_order
from support.results import RESULTS, this_run, write_json
from support.smollm2 import SMOLLM2
from support.timing import spread
from torch.optim import AdamW

from lit_ft import CausalLMModule, InstructionDataModule
from lit_ft.callbacks import ThroughputMonitor
from lit_ft.run.console import quieten_libraries


@dataclass(frozen=True)
class Settings:
    """What all three sides share."""

    steps: int
    skipped_steps: int
    batch_size: int
    max_length: int
    lr: float
    weight_decay: float
    clip: float
    seed: int


@dataclass
class Measurement:
    """One run of one side.

    Args:
        seconds: time from the end of the last skipped step to the end of the last step
        tokens: tokens of the timed steps, without padding
        padded_tokens: tokens of the timed steps, with padding
        targets: tokens of the timed steps that the model learns to predict
        losses: mean loss per target token of every step's batch, before its update
        monitor_tokens_per_second: speed that lit_ft's own ThroughputMonitor reports
    """

    seconds: float
    tokens: int
    padded_tokens: int
    targets: int
    losses: list[float]
    monitor_tokens_per_second: float | None = None
    tokens_per_second: float = field(init=False)

    def __post_init__(self) -> None:
        self.tokens_per_second = self.tokens / self.seconds


class Clock:
    """Notes when each step ends, its loss and the size of its batch."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.sizes: list[tuple[int, int, int]] = []

    def measured(self, settings: Settings) -> Measurement:
        """Return the measurement without the skipped steps."""
        timed = self.sizes[settings.skipped_steps : settings.steps]
        seconds = self.ends[-1] - self.ends[settings.skipped_steps - 1]
        return Measurement(seconds, *map(sum, zip(*timed, strict=True)), self.losses)


class LightningClock(Clock, Callback):
    """A clock that Lightning's Trainer calls."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note loss, size and time of the step."""
        self.losses.append(float(trainer.callback_metrics["train_loss"]))
        padded = batch["input_ids"].numel()
        self.sizes.append((batch["num_tokens"], padded, batch["num_targets"]))
        self.ends.append(time.perf_counter())


class TrainerClock(Clock, transformers.TrainerCallback):
    """A clock that transformers' Trainer calls. It wraps the collator: callbacks see no batch."""

    def __init__(self, collator: Callable[[Any], Any]) -> None:
        super().__init__()
        self.collator = collator

    def collate(self, rows: list[dict[str, Any]]) -> Any:
        """Collate the rows and note the size of the batch."""
        batch = self.collator(rows)
        targets = int((batch["labels"][:, 1:] != -100).sum())
        self.sizes.append((int(batch["attention_mask"].sum()), batch["input_ids"].numel(), targets))
        return batch

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note when the step ends."""
        self.ends.append(time.perf_counter())

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        """Note the loss of the step."""
        if "loss" in logs:
            self.losses.append(logs["loss"])


def data_module(settings: Settings) -> InstructionDataModule:
    """Return the embedded data, encoded and ready."""
    data = InstructionDataModule(
        tokenizer=SMOLLM2.load_tokenizer(),
        max_length=settings.max_length,
        batch_size=settings.batch_size,
        overlong="drop",
        seed=settings.seed,
    )
    data.prepare_data()
    data.setup()
    return data


def run_lit_ft(settings: Settings) -> Measurement:
    """Train with lit_ft."""
    module = CausalLMModule(
        SMOLLM2,
        optimizer=partial(AdamW, lr=settings.lr, weight_decay=settings.weight_decay, fused=True),
        seed=settings.seed,
    )
    clock, monitor = LightningClock(), ThroughputMonitor(skip_steps=settings.skipped_steps)
    trainer = Trainer(
        accelerator="cpu",
        precision="32-true",
        max_steps=settings.steps,
        gradient_clip_val=settings.clip,
        use_distributed_sampler=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=False,
        callbacks=[monitor, clock],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data_module(settings))
    result = clock.measured(settings)
    result.monitor_tokens_per_second = monitor.tokens_per_second
    return result


def run_trainer(settings: Settings, examples: Dataset, order: str) -> Measurement:
    """Train with transformers' Trainer on `examples`; `order` is sequential or random."""
    model = SMOLLM2.load_model(torch.float32)
    tokenizer = SMOLLM2.load_tokenizer()
    # The Trainer's default collator pads the inputs but not the labels: this one pads both.
    clock = TrainerClock(transformers.DataCollatorForSeq2Seq(tokenizer))
    arguments = transformers.TrainingArguments(
        output_dir=str(RESULTS),  # nothing is written there
        use_cpu=True,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        train_sampling_strategy=order,
        optim="adamw_torch_fused",
        learning_rate=settings.lr,
        lr_scheduler_type="constant",
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.clip,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=settings.seed,
    )
    trainer = transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=examples,
        data_collator=clock.collate,
        callbacks=[clock],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return clock.measured(settings)


def run_in_turn(settings: Settings, rounds: int) -> dict[str, list[Measurement]]:
    """Measure the sides in turn, `rounds` times."""
    data = data_module(settings)
    ours = examples_in_order(data, settings.steps)
    every = data.train_examples.select_columns(["input_ids", "labels"])
    sides: dict[str, Callable[[], Measurement]] = {
        LIT_FT: lambda: run_lit_ft(settings),
        SAME: lambda: run_trainer(settings, ours, "sequential"),
        RANDOM: lambda: run_trainer(settings, every, "random"),
    }
    results: dict[str, list[Measurement]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, run in sides.items():
            gc.collect()
            results[name].append(run())
            last = results[name][-1]
            print(f"round {number + 1}/{rounds}  {name}: {last.tokens_per_second:.1f} tok/s")
    check_same_work(results[LIT_FT][0], results[SAME][0])
    return results


def check_same_work(ours: Measurement, theirs: Measurement) -> None:
    """Fail unless both trained on the same batches and their losses agree at every step."""
    for size in ("tokens", "padded_tokens", "targets"):
        assert getattr(ours, size) == getattr(theirs, size), size
    for step, (mine, other) in enumerate(zip(ours.losses, theirs.losses, strict=True)):
        assert abs(mine - other) <= 1e-3 * other, f"step {step}: lit_ft {mine}, Trainer {other}"


def report(
    settings: Settings, results: dict[str, list[Measurement]], load_average: float
) -> dict[str, Any]:
    """Return what goes into the JSON file."""
    about = this_run()
    speeds = {name: spread(run.tokens_per_second for run in runs) for name, runs in results.items()}
    return {
        **about,
        "versions": {**about["versions"], "accelerate": importlib.metadata.version("accelerate")},
        "settings": {"model": SMOLLM2.name, "dtype": "float32", **asdict(settings)},
        "load_average_before": round(load_average, 2),
        "sides": {
            name: {
                "tokens_per_second": speeds[name],
                "lit_ft_ratio": speeds[LIT_FT]["median"] / speeds[name]["median"],
                "runs": [asdict(run) for run in runs],
            }
            for name, runs in results.items()
        },
    }


def parse() -> argparse.Namespace:
    parser = script_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side, in turn")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of a run")
    parser.add_argument("--skipped-steps", type=int, default=2, help="steps before the timed ones")
    parser.add_argument("--batch-size", type=int, default=4, help="examples in a batch")
    parser.add_argument("--max-length", type=int, default=512, help="longer examples are left out")
    parser.add_argument("--lr", type=float, default=1e-4, help="learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.01, help="AdamW's weight decay")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradients")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of the examples")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="threads of torch"
    )
    return parser.parse_args()


def main() -> None:
    options = vars(parse())
    rounds, threads, output = (options.pop(name) for name in ("rounds", "threads", "output"))
    torch.set_num_threads(threads)
    quieten_libraries()
    settings = Settings(**options)
    load_average = os.getloadavg()[0]
    found = report(settings, run_in_turn(settings, rounds), load_average)
    show(found["sides"])
    write_json(output / "against_hf_trainer.json", found)
    (output / "against_hf_trainer.md").write_text(as_markdown(found), encoding="utf-8")


if __name__ == "__main__":
    main()
