"""The trained model in Hugging Face format."""

from __future__ import annotations

from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only


class ExportHF(Callback):
    """Write `pl_module.model` and `pl_module.tokenizer` at the end of `fit`, from rank 0.

    `AutoModelForCausalLM.from_pretrained(folder)` loads the result without lit_ft. A run that
    fails exports nothing.

    Args:
        folder: where to write.
        merge: fold an adapter into the weights; else the adapter alone is written.
        dtype: of the written weights, as `bfloat16`; None keeps the model's.

    Attributes:
        export_path: the folder, once it is written.

    Raises:
        MisconfigurationException: at the start of `fit`, if the module has no `model` that can
            save itself.
    """

    def __init__(self, folder: str | Path, merge: bool = True, dtype: str | None = None) -> None:
        self.folder = folder
        self.merge = merge
        self.dtype = dtype
        self.export_path: Path | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse before training what could not be written after it."""
        self.export_path = None
        if not hasattr(getattr(pl_module, "model", None), "save_pretrained"):
            raise MisconfigurationException(
                f"ExportHF writes transformers models: {type(pl_module).__name__}.model has no "
                "save_pretrained(). Keep the model there, or leave ExportHF out."
            )

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the folder."""
        # Not above: it brings transformers and peft along.
        from lit_ft.models.export import export_model

        tokenizer = getattr(pl_module, "tokenizer", None)
        self.export_path = export_model(
            pl_module.model,  # type: ignore[arg-type]
            tokenizer,
            Path(self.folder),
            merge=self.merge,
            dtype=self.dtype,
        )
