"""Export a checkpoint of an earlier run in Hugging Face format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.plugins import HalfPrecision, Precision
from torch import Tensor

from lit_ft.data.encoding import load_chat_template
from lit_ft.data.turns import end_tokens
from lit_ft.models.base import base_of, name_of_folder
from lit_ft.models.export.card import write_cards
from lit_ft.module import CausalLMModule
from lit_ft.run.exits import unwrapped
from lit_ft.run.files import SUMMARY, read_summary
from lit_ft.run.hidden import with_secrets
from lit_ft.run.model_card import training_of
from lit_ft.run.old_names import with_current_names
from lit_ft.run.trust import refuse_untrusted, remote_code
from lit_ft.storage.atomic import existing_or_backup
from lit_ft.storage.checkpoint_folder import CheckpointFolder
from lit_ft.storage.damage import damage
from lit_ft.storage.json_file import read_json
from lit_ft.storage.links import remove_links
from lit_ft.storage.permissions import open_to_others
from lit_ft.storage.plain_values import load_plain


def export_run(
    run_dir: str | Path,
    *,
    checkpoint: str = "last",
    folder: str | Path | None = None,
    merge: bool = True,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    trusted_packages: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> Path:
    """Export a checkpoint of the run in `run_dir`.

    Args:
        run_dir: The folder of the run, which holds its summary.json.
        checkpoint: The checkpoint to export: "last", "best", or the path of one.
        folder: The folder to write to. None writes to `run_dir/export`, or to
            `run_dir/export/adapter` if only the adapter is written.
        merge: Whether to merge an adapter into the model's weights. If False, only the adapter is
            written.
        dtype: The dtype of the written weights, such as "bfloat16"; None keeps the model's own.
        max_shard_size: The largest size of one file, such as "5GB". It applies only to a fully
            fine-tuned model whose checkpoint several ranks saved. At any time, no more than this
            much of that model is in memory.
        trusted_packages: The packages besides lit_ft and its libraries whose classes the run may
            name. What the run itself trusted does not count.
        trust_remote_code: Whether to run Python code from the model's repository, if the run did.

    Returns:
        The folder that was written.

    Raises:
        ValueError: If the run or the checkpoint does not exist, if the environment does not hold a
            secret that the run's model was given, or if `merge` is False and the run has no
            adapter. Also if only the adapter would be written, to a folder that already holds a
            model.
    """
    run_dir = Path(run_dir)
    summary = read_summary(run_dir)
    if summary is None:
        raise ValueError(f"{run_dir} is not the folder of a run: it has no summary.json.")
    path = existing_or_backup(run_dir / "checkpoints" / f"{checkpoint}.ckpt") or existing_or_backup(
        checkpoint
    )
    if path is None:
        found = sorted(p.stem for p in (run_dir / "checkpoints").glob("*.ckpt"))
        raise ValueError(
            f"{run_dir} has no checkpoint '{checkpoint}': it has {', '.join(found) or 'none'}."
        )
    if (reason := damage(path)) is not None:
        others = ", ".join(p.stem for p in sorted(path.parent.glob("*.ckpt")) if p != path)
        raise ValueError(
            f"{path} is damaged: {reason}. Take another one (--checkpoint): {others or 'none'}."
        )
    config: dict[str, Any] = with_current_names(summary["config"])
    for name in ("module", "data", "trainer"):
        if not isinstance(config.get(name), dict):
            raise ValueError(f"{run_dir / SUMMARY} is damaged: its config has no {name}.")
    trust = "--trusted-packages {package}"
    refuse_untrusted({"module": config["module"]}, also=trusted_packages, remedy=trust)
    if not trust_remote_code and (setting := remote_code(config["module"])):
        raise ValueError(
            f"{run_dir} was made with {setting}=true, which runs the Python code in the model's "
            "repository. If you trust it, add --trust-remote-code."
        )
    module = _built(with_secrets(config["module"], "module"), run_dir)
    if module.tokenizer is not None and (template := config["data"].get("chat_template")):
        module.tokenizer.chat_template = load_chat_template(template)  # the one it was trained with
    if module.adapter is None and not merge:
        raise ValueError(f"{run_dir} has trained no adapter: leave out --adapter-only.")
    target = run_dir / "export"
    if folder is not None:
        target = Path(folder)
    elif module.adapter is not None and not merge:
        target /= "adapter"
    if path.is_dir() and module.adapter is None:
        _export_parts(CheckpointFolder(path), module, target, dtype, max_shard_size)
    else:
        _export_loaded(path, run_dir, config, module, target, merge=merge, dtype=dtype)
    steps, val_loss = _result(path, run_dir, summary)
    write_cards(
        target,
        base_of(module.source),
        module.adapter,
        name=name_of_folder(run_dir),
        training=training_of(summary, steps=steps, val_loss=val_loss),
    )
    return target


def _result(
    path: Path, run_dir: Path, summary: Mapping[str, Any]
) -> tuple[int | None, float | None]:
    """Return the steps and the validation loss of a checkpoint, as far as they are known."""
    if path == run_dir / "checkpoints" / "last.ckpt":
        return summary.get("steps"), summary.get("val_loss")
    best = {}
    if path == run_dir / "checkpoints" / "best.ckpt":
        with suppress(OSError, ValueError):  # a damaged one says nothing
            best = read_json(path.with_name("best.json"))
    return best.get("step"), best.get("val_loss")


def _export_loaded(
    path: Path,
    run_dir: Path,
    config: Mapping[str, Any],
    module: CausalLMModule,
    target: Path,
    *,
    merge: bool,
    dtype: str | None,
) -> None:
    """Load a checkpoint into the model that it is of, and export the model."""
    # Imported here, because peft prints when it is imported, and the caller silences it first.
    from lit_ft.models import export_model

    # As the trainer does: the weights get the dtype that they were trained in.
    halves = config["trainer"].get("precision") == "bf16-true"
    precision = HalfPrecision("bf16-true") if halves else Precision()
    with precision.module_init_context():
        module.configure_model()
    # A folder holds only an adapter, which is small.
    saved = CheckpointFolder(path).load_whole() if path.is_dir() else load_plain(path, mmap=True)
    if not isinstance(saved, dict) or "state_dict" not in saved:
        raise ValueError(f"{path} is no checkpoint of a run: it has no state_dict.")
    try:
        module.load_state_dict(_without_subspaces(saved["state_dict"]))
    except RuntimeError as error:
        raise ValueError(f"{path} is a checkpoint of another model than {run_dir}.") from error
    export_model(
        module.model,
        module.tokenizer,
        target,
        merge=merge,
        dtype=dtype,
        end_tokens=end_tokens(module.tokenizer),
    )


def _built(config: Any, run_dir: Path) -> CausalLMModule:
    """Return the module that a run's summary describes."""
    try:
        module = instantiate(config, _convert_="all")
    except InstantiationException as error:
        cause = unwrapped(error)
        if isinstance(cause, ValueError | OSError):
            raise cause from error
        raise ValueError(f"{run_dir / SUMMARY} describes no module: {cause}") from error
    if not isinstance(module, CausalLMModule):
        raise ValueError(f"{run_dir / SUMMARY} describes no module: {type(module).__name__}.")
    return module


def _export_parts(
    checkpoint: CheckpointFolder, module: Any, folder: Path, dtype: str | None, max_shard_size: str
) -> Path:
    """Export a checkpoint of several ranks, which may be too large for one process's memory."""
    from lit_ft.models import dtype_named, export_streamed
    from lit_ft.models.export.chat import save_tokenizer, stop_at

    prefix = "state_dict.model."
    weights = {
        name.removeprefix(prefix): torch.empty(
            entry.size, dtype=entry.properties.dtype, device="meta"
        )
        for name, entry in checkpoint.tensors(prefix).items()
    }

    def read(tensors: dict[str, Tensor]) -> None:
        checkpoint.load({f"{prefix}{name}": tensor for name, tensor in tensors.items()}, alone=True)

    folder.mkdir(parents=True, exist_ok=True)
    remove_links(folder)
    export_streamed(
        module.source.build_empty(),
        _without_subspaces(weights),
        read,
        folder,
        dtype=None if dtype is None else dtype_named(dtype),
        max_shard_size=max_shard_size,
    )
    open_to_others(folder)
    stop_at(folder, end_tokens(module.tokenizer))
    if module.tokenizer is not None:
        save_tokenizer(module.tokenizer, folder)
    return folder


def _without_subspaces(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop GaLore's `delta` and `basis` of each weight; the weight already contains all steps."""
    names = ("weight", "delta", "basis")
    layers = {name.rpartition(".")[0] for name in weights if name.endswith(".basis")}
    layers = {layer for layer in layers if all(f"{layer}.{name}" in weights for name in names)}
    beside = {f"{layer}.{name}" for layer in layers for name in names[1:]}
    return {name: weight for name, weight in weights.items() if name not in beside}
