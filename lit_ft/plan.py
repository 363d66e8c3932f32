"""Plan the memory of a run without running it: `python -m lit_ft.plan model=llama_3_1_8b`.

The plan takes the arguments of train.py. The real model, optimizer and callbacks take two steps on
tensors that have a shape and no memory, so the machine needs neither the card nor the weights. The
plan is made for the GPU of this machine, or for the one in plan.gpu. Without either it names the
size of card that the run needs. With strategy=cpu it is made for this machine's memory.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lit_ft.compat.refusal import message_on_command_line
from lit_ft.run.arguments import composed
from lit_ft.run.console import outlive_terminal, quieten_libraries
from lit_ft.run.redaction import redacted_text
from lit_ft.run.settings import admit
from lit_ft.terminal import console, stage, use_live_line


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the plan, and what other settings would save."""
    options = _parser().parse_intermixed_args(arguments)
    use_live_line()
    quieten_libraries()
    files = [f"--config={file}" for file in options.config]
    try:
        _show([*files, *options.settings], options)
    except (ValueError, OSError) as error:
        sys.exit(redacted_text(message_on_command_line(error)))


def _show(arguments: list[str], options: argparse.Namespace) -> None:
    config = composed(arguments)
    admit(config, config, options.settings)
    with stage("loading libraries"):
        from lit_ft.run.plan import planned
        from lit_ft.run.plan_savings import savings
        from lit_ft.run.plan_text import shown_plan
    with stage("planning"):
        run = planned(config)
    for part in shown_plan(run.plan, run.outside, run.card, run.facts):
        console().print(part)
    if options.json is not None:
        options.json.write_text(json.dumps(_as_json(run), indent=2) + "\n", encoding="utf-8")
    if not options.no_savings:
        for settings, saved in savings(arguments, run):
            console().print(f"{saved:>10} less with {settings}", markup=False, highlight=False)


def _as_json(run: Any) -> dict[str, Any]:
    return {
        **run.plan.to_dict(),
        "outside_bytes": asdict(run.outside),
        "verdict": run.verdict,
        "card": None if run.card is None else asdict(run.card),
        "facts": run.facts,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lit_ft.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "settings", nargs="*", help="choices and settings of train.py, such as optim=adamw_8bit"
    )
    parser.add_argument(
        "--config",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="take settings from a YAML file, as train.py does",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan as JSON too")
    parser.add_argument(
        "--no-savings", action="store_true", help="leave out what other settings would save"
    )
    return parser


if __name__ == "__main__":
    outlive_terminal()
    main()
