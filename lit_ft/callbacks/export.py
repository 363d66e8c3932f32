"""Write the trained model in Hugging Face format."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_ft.callbacks._support.finite import keep_finite
from lit_ft.tensors.sharding import is_model_sharded
from lit_ft.terminal import stage


class ExportHF(Callback):
    """Write `pl_module.model` and `pl_module.tokenizer` at the end of `fit`.

    `AutoModelForCausalLM.from_pretrained(folder)` loads the result without lit_ft. `generate` then
    stops at the model's own end tokens, at the token that ends an answer in the tokenizer's chat
    template, and at the end-of-text token. The folder gets a model card, README.md, unless it has
    one that lit_ft has not written. A run that fails exports nothing.

    Args:
        folder: The folder to write to, created if it is missing.
        merge: Whether to merge an adapter into the weights. Otherwise only the adapter is written.
        dtype: The dtype of the written weights, such as "bfloat16"; None keeps the model's own.
        push_to_hub: The Hugging Face repository ("user/name") to upload the folder to, created if
            it is missing; None uploads nothing. A failed upload gives a warning and leaves the
            folder in place.
        private: Whether the repository is private, if `push_to_hub` creates it.

    Attributes:
        export_path: The folder that was written; None before the export.

    Raises:
        MisconfigurationException: At the start of `fit`, if `pl_module.model` has no
            `save_pretrained`, if `push_to_hub` is not a valid repository name, or if `push_to_hub`
            is given and there is no login to the Hugging Face Hub.
        FloatingPointError: At the end of `fit`, if a weight is not finite. Nothing is written.

    Example:
        >>> import lightning as L
        >>> export = ExportHF("my-model", dtype="bfloat16")
        >>> trainer = L.Trainer(callbacks=[export], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        folder: str | Path,
        merge: bool = True,
        dtype: str | None = None,
        push_to_hub: str | None = None,
        private: bool = True,
    ) -> None:
        self.folder = folder
        self.merge = merge
        self.dtype = dtype
        self.push_to_hub = push_to_hub
        self.private = private
        self.export_path: Path | None = None
        self._is_uploaded = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before training, refuse a model that could not be written or uploaded after training."""
        self.export_path = None
        self._is_uploaded = False
        if not hasattr(getattr(pl_module, "model", None), "save_pretrained"):
            raise MisconfigurationException(
                f"ExportHF writes transformers models: {type(pl_module).__name__}.model has no "
                "save_pretrained(). Keep the model there, or leave ExportHF out."
            )
        if self.push_to_hub is not None:
            _check_hub(self.push_to_hub)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the model to the folder, and upload it if `push_to_hub` is given."""
        keep_finite(trainer, pl_module, "exported")
        # Ranks that torchrun starts may name their run folders by different times: use rank 0's.
        folder = Path(trainer.strategy.broadcast(str(self.folder)))
        if not trainer.is_global_zero and not is_model_sharded(pl_module.model):
            return  # only ranks that hold a part of the model write
        # Imported here because it imports transformers and peft.
        from lit_ft.data.turns import end_tokens
        from lit_ft.models.export.whole import export_model

        tokenizer = getattr(pl_module, "tokenizer", None)
        with stage("exporting the model"):
            self.export_path = export_model(
                pl_module.model,  # type: ignore[arg-type]
                tokenizer,
                folder,
                merge=self.merge,
                dtype=self.dtype,
                end_tokens=end_tokens(tokenizer),
            )
        if self.push_to_hub is not None and trainer.is_global_zero:
            with stage(f"uploading to {self.push_to_hub}"):
                self._is_uploaded = _upload(
                    self.export_path, self.push_to_hub, private=self.private
                )

    def upload_cards(self) -> None:
        """Upload the model cards again, which may say more once the model is validated."""
        if self._is_uploaded and self.push_to_hub is not None and self.export_path is not None:
            with stage(f"uploading the model card to {self.push_to_hub}"):
                _upload(self.export_path, self.push_to_hub, private=self.private, only="*README.md")


def _check_hub(repository: str) -> None:
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise MisconfigurationException(f"push_to_hub={repository}: {error}") from error
    if get_token() is None:
        raise MisconfigurationException(
            f"push_to_hub={repository} needs a login: run `hf auth login`, or set HF_TOKEN."
        )


def _upload(folder: Path, repository: str, *, private: bool, only: str | None = None) -> bool:
    """Upload a folder, or the files in it that a pattern fits; return whether it is uploaded."""
    try:
        api = HfApi()
        created = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=created.repo_id, folder_path=folder, allow_patterns=only)
    except Exception as error:  # networks fail in many ways, and none may cost the trained model
        rank_zero_warn(
            f"Not uploaded to {repository}: {error!r}. The model is in {folder}; to try again: "
            f"hf upload {repository} {folder}"
        )
    else:
        rank_zero_info(f"Uploaded to {created}")
        return True
    return False
