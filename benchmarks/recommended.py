"""Which way to train models of 1, 8 and 32 billion weights fits which card?

    python benchmarks/recommended.py
    python benchmarks/recommended.py --only llama_3_1_8b

It asks `python -m lit_ft.plan recommend=true` for each model, and for each card at once. Rows have
2,048 tokens, and four of them are a step. Nothing is trained: the memory is planned, the losses are
those of results/quality.jsonl, which were measured on SmolLM2-135M.

Results: results/recommended.json, and the table in docs/which-method.md that is made of it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.progress import track
from support.arguments import script_parser
from support.recommended_table import CARDS, MODELS, PAGE, with_table
from support.results import RESULTS, ROOT, this_run, write_json


def main() -> None:
    """Ask for each model, write the results as they come, and the table if they are the docs'."""
    parser = script_parser(__doc__)
    parser.add_argument(
        "--only", nargs="*", choices=MODELS, default=list(MODELS), help="models to ask for"
    )
    options = parser.parse_args()
    file = options.output / "recommended.json"
    found: dict[str, Any] = json.loads(file.read_text())["models"] if file.is_file() else {}
    for model in track(options.only, "planning"):
        found[model] = recommended(model)
        write_json(file, {**this_run(), "models": found})
    if options.output == RESULTS:
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")


def recommended(model: str) -> list[dict[str, Any]]:
    """Return the best ways to train a model on each card, as the verb writes them."""
    settings = ["recommend=true", f"model={model}", "data.max_length=2048"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "advice.json"
        command = [*settings, f"plan.gpu={','.join(CARDS)}", "--json", str(file)]
        subprocess.run([sys.executable, "-m", "lit_ft.plan", *command], cwd=ROOT, check=True)
        cards: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["cards"]
    return cards


if __name__ == "__main__":
    main()
