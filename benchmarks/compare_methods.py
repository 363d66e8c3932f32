"""Which method learns how much, in how much memory, at a learning rate of its own?

    python benchmarks/compare_methods.py
    python benchmarks/compare_methods.py --seeds 0
    python benchmarks/compare_methods.py --report runs/compare

It runs `python -m lit_ft.compare experiment=compare_methods` in runs/compare_methods, which goes on
where it was stopped, and keeps its report. --report takes the report of another comparison.

Results: results/compare_methods.json, .md and .csv, and the tables that are made of them in
README.md and docs/which-method.md.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from support.arguments import script_parser
from support.compared_table import PAGES, with_tables
from support.results import RESULTS, ROOT

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
    if options.output == RESULTS:
        report = json.loads((RESULTS / "compare_methods.json").read_text(encoding="utf-8"))
        for page in PAGES:
            page.write_text(with_tables(page.read_text(encoding="utf-8"), report), encoding="utf-8")


if __name__ == "__main__":
    main()
