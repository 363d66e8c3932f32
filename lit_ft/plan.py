"""Plan the memory of a run without running it: `python -m lit_ft.plan model=llama_3_1_8b`.

The plan takes the arguments of train.py. The real model, optimizer and callbacks take two steps on
tensors that have a shape and no memory, so the machine needs neither the card nor the weights. The
plan is made for the GPU of this machine, or for the one in plan.gpu. Without either it names the
size of card that the run needs. With strategy=cpu it is made for this machine's memory.

With run_dir=FOLDER it also writes plan.json and the picture plan.html to FOLDER, as a run does.

With recommend=true it looks for the best ways to train the model on the card, and shows the
commands. With several cards, as in plan.gpu=8GB,24GB,8x80GB, it shows the best way for each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from lit_ft.compat.refusal import message_on_command_line
from lit_ft.run.arguments import composed
from lit_ft.run.console import outlive_terminal, quieten_libraries
from lit_ft.run.loading import loading_libraries
from lit_ft.run.override import name_of
from lit_ft.run.redaction import redacted_text
from lit_ft.run.settings import admit
from lit_ft.run.verb_parser import parser_of_settings
from lit_ft.storage.json_file import write_json
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
            _recommend([*files, *asked], options.json)
        else:
            _show([*files, *asked], options)
    except (ValueError, OSError) as error:
        sys.exit(redacted_text(message_on_command_line(error)))


def _show(arguments: list[str], options: argparse.Namespace) -> None:
    config = composed(arguments)
    with loading_libraries():
        admit(config, config, arguments)  # loads the classes that the settings are for
        from lit_ft.run.plan import planned
        from lit_ft.run.plan_files import write_plan
        from lit_ft.run.plan_savings import savings
        from lit_ft.run.plan_text import shown_plan
    with stage("planning"):
        run = planned(config)
    for part in shown_plan(run.plan, run.outside, run.card, run.facts):
        console().print(part)
    if options.json is not None:
        write_json(options.json, run.to_dict(), indent=2)
    if any(name_of(one) == "run_dir" for one in arguments):
        write_plan(run, config["run_dir"])
    if not options.no_savings:
        for settings, saved in savings(arguments, run):
            console().print(f"{saved:>10} less with {settings}", markup=False, highlight=False)


def _recommend(arguments: list[str], file: Path | None) -> None:
    runs = [(own, composed(own)) for own in _for_each_card(arguments)]
    with loading_libraries():
        for own, config in runs:
            admit(config, config, own)
        from lit_ft.run.plan import card_of
        from lit_ft.run.recommend import Advice, Planner, Recipe, best_of, recipes
        from lit_ft.run.recommend_text import shown_advice
    asked = [(own, *card_of(config)) for own, config in runs]
    planner, given = Planner(), []
    with ExitStack() as planning:
        for own, card, devices in asked:
            found = []
            for one in recipes(own, card, devices, planner):
                if isinstance(one, Recipe):
                    found.append(one)
                else:
                    planning.close()
                    planning.enter_context(stage(f"planning with {' '.join(one.settings)}"))
            given.append(Advice(own, card, devices, best_of(found)))
    for part in shown_advice(given):
        console().print(part, soft_wrap=isinstance(part, str))
    if file is not None:
        write_json(file, {"cards": [advice.to_dict() for advice in given]}, indent=2)


def _for_each_card(arguments: Sequence[str]) -> list[list[str]]:
    """Return the arguments for each of the cards that plan.gpu=8GB,24GB,8x80GB names."""
    named = [one.partition("=")[2] for one in arguments if name_of(one) == "plan.gpu"]
    if not named:
        return [list(arguments)]
    others = [one for one in arguments if name_of(one) != "plan.gpu"]
    return [[*others, f"plan.gpu={card.strip()}"] for card in named[-1].split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = parser_of_settings("python -m lit_ft.plan", __doc__, example="optim=adamw_8bit")
    parser.add_argument(
        "--recommend",
        action="store_true",
        help="find the five best ways to train on the card (recommend=true is the same)",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the plan or the best ways as JSON too"
    )
    parser.add_argument(
        "--no-savings", action="store_true", help="leave out what other settings would save"
    )
    return parser


if __name__ == "__main__":
    outlive_terminal()
    main()
