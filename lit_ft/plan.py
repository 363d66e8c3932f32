"""Plan the memory of a run without running it: `python -m lit_ft.plan model=llama_3_1_8b`.

The plan takes the arguments of train.py. The real model, optimizer and callbacks take two steps on
tensors that have a shape and no memory, so the machine needs neither the card nor the weights. The
plan is made for the GPU of this machine, or for the one in plan.gpu. Without either it names the
size of card that the run needs. With strategy=cpu it is made for this machine's memory.

With recommend=true it looks for the best ways to train the model on the card, and shows the
commands.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lit_ft.compat.refusal import message_on_command_line
from lit_ft.run.arguments import composed
from lit_ft.run.console import outlive_terminal, quieten_libraries
from lit_ft.run.redaction import redacted_text
from lit_ft.run.settings import admit
from lit_ft.run.verb_parser import parser_of_settings
from lit_ft.terminal import console, stage, use_live_line

_RECOMMEND = "recommend=true"


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the plan, and what other settings would save."""
    options = _parser().parse_intermixed_args(arguments)
    use_live_line()
    quieten_libraries()
    files = [f"--config={file}" for file in options.config]
    asked = [one for one in options.settings if one != _RECOMMEND]
    try:
        if len(asked) < len(options.settings) or options.recommend:
            _recommend([*files, *asked])
        else:
            _show([*files, *asked], options)
    except (ValueError, OSError) as error:
        sys.exit(redacted_text(message_on_command_line(error)))


def _admitted(arguments: list[str]) -> dict[str, Any]:
    config = composed(arguments)
    admit(config, config, arguments)
    return config


def _show(arguments: list[str], options: argparse.Namespace) -> None:
    config = _admitted(arguments)
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


def _recommend(arguments: list[str]) -> None:
    config = _admitted(arguments)
    with stage("loading libraries"):
        from lit_ft.run.plan import card_of
        from lit_ft.run.recommend import Recipe, best_of, recipes
        from lit_ft.run.recommend_text import shown_recipes
    card, devices = card_of(config)
    found = []
    with ExitStack() as planning:
        for one in recipes(arguments, card, devices):
            if isinstance(one, Recipe):
                found.append(one)
            else:
                planning.close()
                planning.enter_context(stage(f"planning with {' '.join(one.settings)}"))
    for part in shown_recipes(best_of(found), card, devices, arguments):
        console().print(part, soft_wrap=isinstance(part, str))


def _as_json(run: Any) -> dict[str, Any]:
    return {
        **run.plan.to_dict(),
        "outside_bytes": asdict(run.outside),
        "verdict": run.verdict,
        "card": None if run.card is None else asdict(run.card),
        "facts": run.facts,
    }


def _parser() -> argparse.ArgumentParser:
    parser = parser_of_settings("python -m lit_ft.plan", __doc__, example="optim=adamw_8bit")
    parser.add_argument(
        "--recommend",
        action="store_true",
        help="find the five best ways to train on the card (recommend=true is the same)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan as JSON too")
    parser.add_argument(
        "--no-savings", action="store_true", help="leave out what other settings would save"
    )
    return parser


if __name__ == "__main__":
    outlive_terminal()
    main()
