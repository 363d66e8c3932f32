"""Say in the model card of an export what its run was: data, recipe, loss and command."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only

from lit_ft.callbacks import ExportHF
from lit_ft.callbacks._support.trainer import find_callback
from lit_ft.data.files import READERS, kind_of
from lit_ft.data.sources import EMBEDDED, HUB_NAME
from lit_ft.models.base import base_of, name_of_folder
from lit_ft.models.export.card import Training, write_cards
from lit_ft.module import CausalLMModule
from lit_ft.run.redaction import redacted

# A path that only this machine has: at the start of an argument or of a value in it.
_PLACE = re.compile(r"(?<![^=\[,{:'\" ])(?:~[^/,]*)?/(?!/)(?:[^/,\[\]{}'\"]+/)*(?=[^/,])")


_OF_ADAPTERS = (
    *("r", "lora_alpha", "use_dora", "use_rslora", "init_lora_weights"),
    *("randlora_alpha", "oft_block_size"),
)


@rank_zero_only
def write_cards_of_run(
    trainer: Trainer, module: CausalLMModule, summary: Mapping[str, Any]
) -> None:
    """Write the model cards of what a run has exported, once its results are known.

    Args:
        trainer: The trainer of the run. Cards of an upload are uploaded too.
        module: The module that was trained.
        summary: The fields of summary.json.
    """
    export = find_callback(trainer, ExportHF)
    if export is None or export.export_path is None:
        return
    write_cards(
        export.export_path,
        base_of(module.source),
        module.adapter,
        name=name_of_folder(trainer.default_root_dir),
        repository=export.push_to_hub,
        training=training_of(summary, steps=summary["steps"], val_loss=summary["val_loss"]),
    )
    export.upload_cards()


def training_of(
    summary: Mapping[str, Any], *, steps: int | None, val_loss: float | None
) -> Training:
    """Return what a model card says of a run.

    Args:
        summary: The contents of summary.json, in which entries of earlier versions may be absent.
        steps: The optimizer steps after which the model was exported; None if they are not known.
        val_loss: Its validation loss; None if it is not known.
    """
    summary = redacted(summary)
    config = summary["config"]
    return Training(
        datasets=list(dict.fromkeys(filter(_is_on_hub, _paths(config.get("data") or {})))),
        tags=[group for group in ("galore",) if config.get(group)],
        tables={
            title: rows
            for title, rows in {
                "Data": _data(config.get("data") or {}, summary.get("data") or {}),
                "Recipe": _recipe(summary, config, steps),
                "Loss": _loss(summary.get("initial_val_loss"), val_loss),
                "Versions": {
                    name: version
                    for name, version in (summary.get("versions") or {}).items()
                    if name in ("lit_ft", "torch", "lightning", "transformers", "peft")
                },
            }.items()
            if rows
        },
        command=_command(summary.get("starts") or []),
    )


def _paths(data: Mapping[str, Any]) -> Iterator[str]:
    sources = data.get("sources") or [{"path": data.get("path")}]
    yield from (str(one["path"]) for one in sources if one.get("path"))


def _is_on_hub(path: str) -> bool:
    local = Path(path).expanduser()
    is_name = HUB_NAME.fullmatch(path) is not None and path != EMBEDDED and "/" in path
    return is_name and kind_of(local) not in READERS and not local.exists()


def _data_name(path: str) -> str:
    if _is_on_hub(path):
        return f"[{path}](https://huggingface.co/datasets/{path})"
    return f"`{Path(path).name}`"


def _data(config: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, str]:
    names = [_data_name(path) for path in _paths(config)]
    rows = {"trained on": ", ".join(dict.fromkeys(names))} if names else {}
    if path := config.get("val_path"):
        rows["validated on"] = _data_name(str(path))
    if train := data.get("train"):
        rows["training rows"] = f"{train['examples']:,}"
        rows["training tokens"] = f"{train['tokens']:,}, of them {train['targets']:,} targets"
    if val := data.get("val"):
        rows["validation rows"] = f"{val.get('used', val['examples']):,} of {val['examples']:,}"
    if length := config.get("max_length"):
        rows["length of a row"] = f"up to {length:,} tokens"
    return rows


def _recipe(
    summary: Mapping[str, Any], config: Mapping[str, Any], steps: int | None
) -> dict[str, str]:
    data, trainer = config.get("data") or {}, config.get("trainer") or {}
    optim, adapter = config.get("optim") or {}, config.get("adapter") or {}
    rows = (summary.get("data") or {}).get("rows_per_step")
    micro = f"{data.get('batch_size')} × {trainer.get('accumulate_grad_batches', 1)} micro-batches"
    facts = {
        "method": _method(adapter, config.get("galore") or {}),
        "optimizer": _options(_class(optim), optim, ("lr", "weight_decay")),
        "schedule": _schedule(config.get("schedule") or {}),
        "steps": None if steps is None else f"{steps:,}",
        "rows in a step": micro if rows is None else f"{rows:,} ({micro})",
        "precision": trainer.get("precision"),
        "gradient clipping": trainer.get("gradient_clip_val"),
        "seed": summary.get("seed"),
        "hardware": _hardware(summary.get("hardware") or {}),
    }
    return {name: str(fact) for name, fact in facts.items() if fact not in (None, "")}


def _method(adapter: Mapping[str, Any], galore: Mapping[str, Any]) -> str:
    if adapter:
        return _options(_class(adapter), adapter, _OF_ADAPTERS)
    if galore:
        projector = _class(galore.get("projector") or {})
        return _options(f"GaLore, {projector}", galore, ("rank",))
    return "all weights"


def _schedule(config: Mapping[str, Any]) -> str:
    """Return the name of the schedule without what is the same in all of transformers' names."""
    name = _class(config.get("schedule") or {})
    name = name.removeprefix("get_").removesuffix("_with_warmup").removesuffix("_schedule")
    return _options(name, config, ("warmup",))


def _class(node: Mapping[str, Any]) -> str:
    return str(node.get("_target_") or "").rpartition(".")[2]


def _options(what: str, node: Mapping[str, Any], names: tuple[str, ...]) -> str:
    given = [f"{name}={node[name]}" for name in names if node.get(name) not in (None, False)]
    return ", ".join([*([what] if what else []), *given])


def _hardware(hardware: Mapping[str, Any]) -> str:
    return ", ".join(hardware.get("gpus") or [str(hardware.get("cpu") or "")])


def _loss(before: float | None, after: float | None) -> dict[str, str]:
    """Return the mean losses of the target tokens of the validation rows, and perplexities."""
    losses = {"validation loss before": before, "validation loss after": after}
    return {
        when: f"{loss:.4f} (perplexity {math.exp(min(loss, 700)):.2f})"
        for when, loss in losses.items()
        if loss is not None
    }


def _command(starts: list[Mapping[str, Any]]) -> str:
    """Return the command of the last start, with paths of this machine cut to their last part."""
    if not starts:
        return ""
    arguments = [_PLACE.sub("", str(one)) for one in starts[-1]["arguments"]]
    return shlex.join(["python", "train.py", *arguments])
