"""Write a run's checkpoint in Hugging Face format: `python -m lit_ft.export runs/r1`.

A finished run has exported its last weights already. This exports its best ones, those of a run
that did not finish, or another precision.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor

from lit_ft.config import refuse_untrusted
from lit_ft.console import quieten_libraries
from lit_ft.summary import read_summary


def main(arguments: Sequence[str] | None = None) -> None:
    """Rebuild the run's model, load the checkpoint into it, export it."""
    options = _parser().parse_args(arguments)
    quieten_libraries()
    try:
        folder = export_run(
            options.run_dir,
            checkpoint=options.checkpoint,
            folder=options.output,
            merge=not options.adapter_only,
            dtype=options.dtype,
        )
    except ValueError as error:
        sys.exit(str(error))
    print(folder)


def export_run(
    run_dir: str | Path,
    *,
    checkpoint: str = "last",
    folder: str | Path | None = None,
    merge: bool = True,
    dtype: str | None = None,
) -> Path:
    """Export a checkpoint of the run in `run_dir`.

    Args:
        run_dir: The run's folder, with its summary.json.
        checkpoint: "last", "best", or a checkpoint's path.
        folder: Where to; `run_dir/export` if None.
        merge: Fold an adapter into the weights; else write the adapter alone.
        dtype: Of the written weights; None keeps the model's.

    Raises:
        ValueError: No such run or checkpoint.
    """
    # Not above: peft's imports speak before they can be silenced.
    from lit_ft.models import export_model

    run_dir = Path(run_dir)
    summary = read_summary(run_dir)
    if summary is None:
        raise ValueError(f"{run_dir} is not the folder of a run: it has no summary.json.")
    path = run_dir / "checkpoints" / f"{checkpoint}.ckpt"
    path = path if path.is_file() else Path(checkpoint)
    if not path.is_file():
        found = sorted(p.stem for p in (run_dir / "checkpoints").glob("*.ckpt"))
        raise ValueError(
            f"{run_dir} has no checkpoint '{checkpoint}': it has {', '.join(found) or 'none'}."
        )
    config: dict[str, Any] = summary["config"]
    refuse_untrusted(config, also=config["trusted_packages"])
    module = instantiate(config["module"], _convert_="all")
    module.configure_model()
    weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    module.load_state_dict(_without_subspaces(weights))
    target = Path(folder) if folder is not None else run_dir / "export"
    return export_model(module.model, module.tokenizer, target, merge=merge, dtype=dtype)


def _without_subspaces(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out what GaLore keeps beside each weight, into which its steps are folded already."""
    names = ("weight", "delta", "basis")
    layers = {name.rpartition(".")[0] for name in weights if name.endswith(".basis")}
    layers = {layer for layer in layers if all(f"{layer}.{name}" in weights for name in names)}
    beside = {f"{layer}.{name}" for layer in layers for name in names[1:]}
    return {name: weight for name, weight in weights.items() if name not in beside}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lit_ft.export", description=__doc__)
    parser.add_argument("run_dir")
    parser.add_argument("--checkpoint", default="last", help="last, best, or a path")
    parser.add_argument("--output", help="folder to write to; run_dir/export if not given")
    parser.add_argument("--adapter-only", action="store_true", help="do not merge the adapter")
    parser.add_argument("--dtype", help="of the written weights, e.g. bfloat16")
    return parser


if __name__ == "__main__":
    main()
