"""How does lit_ft compare with its peers on the same model, data, batches, precision and seeds?

    python benchmarks/peers.py                          # every rate of every row, with seed 0
    python benchmarks/peers.py --rates best --seeds 0 1 2
    python benchmarks/peers.py --resume
    python benchmarks/peers.py --speed
    python benchmarks/peers.py --table                  # only the table of the results

The peers are transformers' Trainer with six of its optimizers, TRL's SFTTrainer, peft's LoRA, and
galore-torch in a loop by hand. Each is held against the row of lit_ft that is closest to it. Each
row trains SmolLM2-135M in float32 on the CPU in a process of its own, and every row sees the same
batches in the same order, and the same schedule.

- The first command measures the held-out loss at each learning rate, and peak memory. A library in
  front of malloc counts what torch's CPU allocator has in use, for all rows alike.
- `--resume` asks whether a run that stops halfway, and goes on from its own checkpoint in a new
  process, ends with the weights of a run that never stops. The model is tiny and random.
- `--speed` lets each peer and its row of lit_ft take turns, step by step, in two processes.

A row that fails is a row with its reason. What is in the results is not run again; `--retry` runs
again what failed. A peer whose package lit_ft does not need has an environment of its own, which
pip fills. The script needs Linux and a C compiler.

Results: results/peers.jsonl, a line for each run, added as runs end; and results/peers.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from support.arguments import script_parser
from support.counted import compiled_counter
from support.peers.environment import NotInstalled
from support.peers.figures import best_rate_of, key_of, latest
from support.peers.job import SETTINGS, Job
from support.peers.meter import SKIPPED_STEPS
from support.peers.one import do
from support.peers.page import HEADINGS, as_markdown, table
from support.peers.processes import Processes, scratch
from support.peers.rows import PEERS, ROWS, TRAINED, UNTRAINED
from support.peers.weights import largest_difference, read_weights
from support.results import append_json_line, read_json_lines, this_run
from support.timing import spread

from lit_ft.storage.cache_dir import user_cache

Options = argparse.Namespace
Record = dict[str, Any]

COMMON = ("batch_size", "max_length")
SAME_SETTINGS = {  # records of a kind are compared if these are alike
    "train": ("model", "steps", "val_examples", *COMMON),
    "speed": ("model", "speed_steps", *COMMON),
    "resume": ("resume_steps", *COMMON),
}


def main() -> None:
    """Run what the results lack, then print the table."""
    options = _parser().parse_args()
    if options.one:
        do(options.one, options.job)
        return
    torch.set_num_threads(options.threads)
    if not options.table:
        run_pass = _resume if options.resume else _speed if options.speed else _train
        for record in run_pass(options):
            _keep(record, options)
    records = _records(options)
    shown = Table(*HEADINGS)
    for row in table(records):
        shown.add_row(*row)
    Console().print(shown)
    if records:
        page = as_markdown(records, vars(options))
        (options.output / "peers.md").write_text(page, encoding="utf-8")


def _train(options: Options) -> Iterator[Record]:
    """Train the rows at the rates and seeds that are asked for."""
    with scratch() as library:
        processes = Processes(options.environments, compiled_counter(library))
        todo = list(_runs(options))
        for number, (row, rate, seed) in enumerate(todo, 1):
            print(f"{number}/{len(todo)}  {row} at {rate:g}, seed {seed}", flush=True)
            with scratch() as folder:
                found = _run(processes, row, _job(options, rate, folder, seed=seed))
            if found is not None:
                yield {"kind": "train", "row": row, "lr": rate, "seed": seed, **_timed(found)}


def _runs(options: Options) -> Iterator[tuple[str, float, int]]:
    """Yield row, rate and seed of each run that the results lack."""
    done = _done(options)
    for row in options.only or ROWS:
        rates: tuple[float, ...] = ROWS[row].rates
        seeds = options.seeds[:1]
        if options.rates == ["best"]:
            best = best_rate_of(_records(options), row)
            rates, seeds = () if best is None else (best,), options.seeds
        elif options.rates != ["all"] and row != UNTRAINED:
            rates = tuple(map(float, options.rates))
        for seed in seeds[:1] if row == UNTRAINED else seeds:
            yield from ((row, lr, seed) for lr in rates if ("train", row, lr, seed) not in done)


def _resume(options: Options) -> Iterator[Record]:
    """Ask of each row whether a run that stops and goes on ends as one that never stops."""
    processes = Processes(options.environments)
    done = _done(options)
    for row in (name for name in options.only or TRAINED if name != UNTRAINED):
        if ("resume", row) not in done:
            print(f"{row} stops and resumes", flush=True)
            found = _resumed(processes, row, options)
            if found is not None:
                yield {"kind": "resume", "row": row, **found}


def _resumed(processes: Processes, row: str, options: Options) -> Record | None:
    rate = ROWS[row].rates[1]
    with scratch() as one, scratch() as other:
        straight = _job(options, rate, one, model="tiny", steps=2 * options.resume_steps)
        stopped = replace(straight, folder=str(other), stop_after=options.resume_steps)
        resumed = replace(straight, folder=str(other), resumes=True, weights=True)
        for job in (replace(straight, weights=True), stopped, resumed):
            found = _run(processes, row, job)
            if found is None or "error" in found:
                return found
        apart = largest_difference(
            read_weights(resumed.last_weights), read_weights(straight.last_weights)
        )
    return {"largest_difference": apart, "note": found["note"], "versions": found["versions"]}


def _speed(options: Options) -> Iterator[Record]:
    """Let each peer take turns with its rows of lit_ft, in several rounds."""
    processes = Processes(options.environments)
    done = _done(options)
    for number in range(options.rounds):
        for peer in (name for name in options.only or PEERS if name in PEERS):
            for ours in PEERS[peer].against:
                if ("speed", peer, ours, number) in done:
                    continue
                print(f"round {number + 1}/{options.rounds}  {peer} and {ours}", flush=True)
                try:
                    found = _in_turn(processes, peer, ours, options)
                except RuntimeError as error:
                    found = {"error": str(error)}
                except NotInstalled as error:
                    print(f"  left out: {error}")
                    continue
                yield {"kind": "speed", "peer": peer, "ours": ours, "round": number, **found}


def _in_turn(processes: Processes, peer: str, ours: str, options: Options) -> Record:
    """Return the speeds of both, and how many times as fast ours is, step by step."""
    with scratch() as one, scratch() as other:
        jobs = {
            row: _job(options, ROWS[row].rates[1], folder, steps=options.speed_steps)
            for row, folder in ((peer, one), (ours, other))
        }
        with (
            processes.taking_turns(peer, jobs[peer]) as theirs,
            processes.taking_turns(ours, jobs[ours]) as our,
        ):
            steps = [(theirs.step(), our.step()) for _ in range(options.speed_steps)]
    timed = _without_first(steps)
    return {
        "tokens_per_second": {
            row: spread(pair[place][1] / pair[place][0] for pair in timed)
            for place, row in enumerate((peer, ours))
        },
        "times_as_fast": spread(theirs[0] / our[0] for theirs, our in timed),
    }


def _job(
    options: Options,
    rate: float,
    folder: Path,
    *,
    seed: int = 0,
    model: str | None = None,
    steps: int | None = None,
) -> Job:
    return Job(
        rate=rate,
        seed=seed,
        model=model or options.model,
        steps=steps or options.steps,
        batch_size=options.batch_size,
        max_length=options.max_length,
        val_examples=options.val_examples,
        threads=options.threads,
        folder=str(folder),
    )


def _run(processes: Processes, row: str, job: Job) -> Record | None:
    """Return what the job has written; None if there is no environment for it."""
    try:
        return processes.run(row, job)
    except NotInstalled as error:
        print(f"  left out: {error}")
        return None


def _timed(found: Record) -> Record:
    """Put the median and the range of the steps in the place of all steps."""
    seconds, tokens = found.pop("step_seconds", []), found.pop("step_tokens", [])
    if not seconds:
        return found
    steps = _without_first(list(zip(seconds, tokens, strict=True)))
    return found | {
        "first_step_seconds": seconds[0],
        "step_seconds": spread(second for second, _ in steps),
        "tokens_per_second": spread(count / second for second, count in steps),
    }


def _without_first(steps: list[Any]) -> list[Any]:
    return steps[SKIPPED_STEPS:] or steps[-1:]


def _keep(record: Record, options: Options) -> None:
    """Add a record to the results, and say what it is."""
    settings = {name: getattr(options, name) for name in SAME_SETTINGS[record["kind"]]}
    append_json_line(options.output / "peers.jsonl", {**this_run(), "settings": settings, **record})
    said = {
        "train": lambda: f"held-out loss {record['held_out_loss']}",
        "resume": lambda: f"{record['largest_difference']:.1e} apart",
        "speed": lambda: f"lit_ft is {record['times_as_fast']['median']:.2f} times as fast",
    }
    print(f"  {record['error'] if 'error' in record else said[record['kind']]()}", flush=True)


def _records(options: Options) -> list[Record]:
    """Return the last record of each run with these settings."""
    return latest(
        record
        for record in read_json_lines(options.output / "peers.jsonl")
        if all(
            record["settings"][name] == getattr(options, name)
            for name in SAME_SETTINGS[record["kind"]]
        )
    )


def _done(options: Options) -> set[tuple[Any, ...]]:
    """Return the keys of the runs that need not run."""
    kept = (each for each in _records(options) if not (options.retry and "error" in each))
    return {key_of(record) for record in kept}


def _parser() -> argparse.ArgumentParser:
    parser = script_parser(__doc__)
    add = parser.add_argument
    add("--only", nargs="*", choices=ROWS, metavar="ROW", help=f"rows to run: {', '.join(ROWS)}")
    add(
        "--rates",
        nargs="+",
        default=["all"],
        help="all, with the first seed; best, with all; or numbers",
    )
    add("--seeds", nargs="+", type=int, default=[0], help="the first one finds the rates")
    add("--model", choices=SETTINGS, default="smollm2", help="tiny: random weights, for trials")
    add("--steps", type=int, default=40, help="optimizer steps of a run")
    add("--batch-size", type=int, default=4, help="examples in a batch")
    add("--max-length", type=int, default=256, help="longer examples are left out")
    add("--val-examples", type=int, default=48, help="held-out examples")
    add("--speed", action="store_true", help="measure speed: peers and lit_ft take turns")
    add("--rounds", type=int, default=2, help="rounds of --speed")
    add("--speed-steps", type=int, default=11, help="steps of each row in a round")
    add("--resume", action="store_true", help="ask whether a stopped run ends as one that was not")
    add("--resume-steps", type=int, default=4, help="steps before the stop, and after it")
    add("--table", action="store_true", help="write the table and run nothing")
    add("--retry", action="store_true", help="run again what has failed")
    add("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    add(
        "--environments",
        type=Path,
        default=user_cache() / "peers",
        metavar="FOLDER",
        help="folder of the environments of peers; PIP_FIND_LINKS names a folder of wheels",
    )
    add("--one", choices=ROWS, metavar="ROW", help=argparse.SUPPRESS)  # a row's own process
    add("--job", type=Path, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
