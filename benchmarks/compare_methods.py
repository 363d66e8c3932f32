"""Which method learns how much, in how much memory, at a learning rate of its own?

    python benchmarks/compare_methods.py
    python benchmarks/compare_methods.py --seeds 0
    python benchmarks/compare_methods.py --report runs/compare

It runs `python -m lit_ft.compare experiment=compare_methods` in runs/compare_methods, which goes on
where it was stopped, and keeps its report. --report takes the report of another comparison.

Then it plans each method for Llama 3.1 8B: one row of 2,048 tokens, bfloat16 weights, activations
computed twice.

Results: results/compare_methods.json, .md and .csv, results/compare_methods_8b.json, and the tables
that are made of them in README.md and docs/which-method.md.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.progress import track
from support.arguments import script_parser
from support.compared_table import PAGES, with_tables
from support.results import RESULTS, ROOT, this_run, write_json

LARGE = (
    *("model=llama_3_1_8b", "plan.gpu=80GB", "data.batch_size=1", "data.max_length=2048"),
    "module.activation_checkpointing=true",
)
_OF_THE_RUN = ("run_dir=", "overwrite=", "ui=")
_FOLDER = Path("runs/compare_methods")  # relative, as the report names the folders of its runs


def main() -> None:
    """Compare, keep the report, and write the tables if the results are the docs'."""
    parser = script_parser(__doc__)
    parser.add_argument("--seeds", default="0,1,2", help="seeds of each method (0,1,2)")
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="folder of a comparison")
    options = parser.parse_args()
    folder = options.report
    if folder is None:
        folder = ROOT / _FOLDER
        settings = ["experiment=compare_methods", f"seed={options.seeds}", f"run_dir={_FOLDER}"]
        subprocess.run([sys.executable, "-m", "lit_ft.compare", *settings], cwd=ROOT, check=True)
    options.output.mkdir(parents=True, exist_ok=True)
    for kind in ("json", "md", "csv"):
        shutil.copyfile(folder / f"report.{kind}", options.output / f"compare_methods.{kind}")
    report = json.loads((options.output / "compare_methods.json").read_text(encoding="utf-8"))
    planned = {
        row["settings"]: planned_bytes(row["trials"][0]["runs"][0]["arguments"])
        for row in track(report["rows"], "planning an 8B")
    }
    write_json(options.output / "compare_methods_8b.json", {**this_run(), "peak_bytes": planned})
    if options.output == RESULTS:
        for page in PAGES:
            text = with_tables(page.read_text(encoding="utf-8"), report, planned)
            page.write_text(text, encoding="utf-8")


def planned_bytes(arguments: list[str]) -> int:
    """Return the planned peak of a run with these arguments that trains Llama 3.1 8B on a GPU."""
    method = [one for one in arguments if not one.startswith(_OF_THE_RUN)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        command = ["-m", "lit_ft.plan", *method, *LARGE, "--no-savings", "--json", str(file)]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        found: int = json.loads(file.read_text(encoding="utf-8"))["peak_bytes"]
    return found


if __name__ == "__main__":
    main()
