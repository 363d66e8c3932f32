"""Write a run's checkpoint in Hugging Face format: `python -m lit_ft.export runs/r1`.

A finished run has already exported its last weights. Use this to export its best weights, the
weights of an unfinished run, or weights in another precision.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lit_ft.compat.refusal import message_on_command_line
from lit_ft.run.console import outlive_terminal, quieten_libraries
from lit_ft.run.redaction import redacted_text
from lit_ft.terminal import stage, use_live_line


def main(arguments: Sequence[str] | None = None) -> None:
    """Rebuild the run's model, load the checkpoint into it, and export it."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.ollama and options.adapter_only:
        parser.error("--ollama needs the whole model: leave out --adapter-only")
    use_live_line()
    quieten_libraries()
    # Imported here, because peft and torchao print when they are imported.
    from lit_ft.run.export_run import export_run

    if options.trusted_packages:
        sys.path.append(os.getcwd())  # `lit_ft.before_libraries` has taken it off
    try:
        with stage("exporting the model"):
            folder = export_run(
                options.run_dir,
                checkpoint=options.checkpoint,
                folder=options.output,
                merge=not options.adapter_only,
                dtype=options.dtype,
                trusted_packages=options.trusted_packages,
                trust_remote_code=options.trust_remote_code,
            )
    except (ValueError, OSError) as error:
        sys.exit(redacted_text(message_on_command_line(error)))
    if options.ollama:
        _write_modelfile(folder, options.run_dir)
    print(folder)


def _write_modelfile(folder: Path, run_dir: str) -> None:
    # Imported here, because peft prints when it is imported, and the caller silences it first.
    from lit_ft.models.base import name_of_folder
    from lit_ft.models.export.modelfile import write_modelfile

    try:
        notes = write_modelfile(folder, name=name_of_folder(run_dir))
    except (ValueError, OSError) as error:
        sys.exit(f"The model is in {folder}, without a Modelfile: {message_on_command_line(error)}")
    for note in notes:
        print(f"Modelfile: {note}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lit_ft.export", description=__doc__)
    parser.add_argument("run_dir", help="a run's folder")
    parser.add_argument("--checkpoint", default="last", help="last (the default), best, or a path")
    parser.add_argument(
        "--output",
        help="folder to write to; run_dir/export, an adapter alone to run_dir/export/adapter",
    )
    parser.add_argument("--adapter-only", action="store_true", help="do not merge the adapter")
    parser.add_argument(
        "--ollama", action="store_true", help="also write a Modelfile, to import it into Ollama"
    )
    parser.add_argument("--dtype", help="type of the written weights, such as bfloat16; as trained")
    parser.add_argument(
        "--trusted-packages",
        nargs="+",
        default=[],
        metavar="NAME",
        help="packages of your own whose classes the run names, such as its optimizer",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python code in the model's repository, if the run did",
    )
    return parser


if __name__ == "__main__":
    outlive_terminal()
    main()
