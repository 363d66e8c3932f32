"""The LightningModule: any causal language model, its adapter, loss and optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from peft import PeftModel
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import SumMetric
from transformers import PreTrainedTokenizerBase

from lit_ft.compat import remedies
from lit_ft.compat.not_finite import of_loss
from lit_ft.compat.optimizers import class_of, traits_of
from lit_ft.compat.plan import adapter_of
from lit_ft.compat.protocols import (
    KnowsExamples,
    NamesValidation,
    Quantizes,
    clips_as_lightning_does,
)
from lit_ft.compat.ranges import WholeNumber
from lit_ft.compat.refusal import Refusal
from lit_ft.compat.rules import PARTS
from lit_ft.distributed import FSDP2Strategy, TensorParallelStrategy, with_root_gathered
from lit_ft.distributed.plan import Misconfiguration, check_run
from lit_ft.distributed.ranks import data_parallel_rank
from lit_ft.loss import (
    ChunkedCrossEntropy,
    ModelLoss,
    TokenLoss,
    unwrap_peft,
)
from lit_ft.loss.probes import keeps_packed_examples_apart
from lit_ft.loss.targets import IGNORE_INDEX
from lit_ft.loss.token_mean import TokenMean
from lit_ft.models import ModelSource, add_adapter
from lit_ft.models.adapter_names import match_names
from lit_ft.models.adapters import rewrites_base_weights, start_magnitudes
from lit_ft.models.limits import Limits, limits_of
from lit_ft.optim import (
    DECAY_MATRICES,
    GroupRule,
    build_optimizer,
    row_chunked,
    stochastically_rounded,
)
from lit_ft.optim.schedules import LENGTH_UNKNOWN, obey_options, options_of, rebuilt
from lit_ft.subspace.checks import check_steps_from_zero
from lit_ft.tensors.sharding import full_tensor
from lit_ft.tensors.stochastic_rounding import keyed_generator
from lit_ft.terminal import stage

Batch = Mapping[str, Any]


class CausalLMModule(LightningModule):
    """Fine-tune a causal language model.

    Logs `train_loss` (the mean over the target tokens of the global batch), `grad_norm` before
    clipping, `val_loss` and `val_perplexity`. A mixture of experts that adds the loss of its router
    is trained on the sum of both. The router's part, with its coefficient, is not in these values.
    It is logged as `train_router_loss` and `val_router_loss`. With several validation loaders,
    `val_loss` is the mean over the tokens of all, and each has its own `val_loss/NAME`.

    Args:
        model: The source of the model, which is loaded in `configure_model`.
        optimizer: The function that builds the optimizer from parameter groups, such as
            `partial(AdamW, lr=1e-4)`.
        schedule: The function that builds the scheduler from the optimizer and the number of
            optimizer steps; None keeps the learning rate constant.
        groups: The rules that put parameters into groups, with the options of each group.
        adapter: The configuration of an adapter, a `peft.PeftConfig`; None trains all weights.
        loss: The loss, summed over target tokens; None uses `ChunkedCrossEntropy`. If the first
            batch shows that the model transforms its logits or adds losses, the chunked loss is
            replaced by the model's own.
        activation_checkpointing: Whether to recompute each block's activations in backward, to save
            memory.
        compile: Whether to compile the transformer with torch.compile.
        seed: The seed of an adapter's initial values, of dropout, and of the stochastic rounding of
            bfloat16 weights.
    """

    # The weights of a sharded model are loaded one by one after `shard_model`, so callbacks may
    # find a model without values.
    loads_after_sharding = True

    def __init__(
        self,
        model: ModelSource,
        *,
        optimizer: Callable[..., Optimizer],
        schedule: Callable[[Optimizer, float], LRScheduler] | None = None,
        groups: Sequence[GroupRule] = DECAY_MATRICES,
        adapter: Any = None,
        loss: TokenLoss | None = None,
        activation_checkpointing: bool = False,
        compile: bool = False,  # the name that torch and Lightning users know
        seed: WholeNumber = 0,
    ) -> None:
        super().__init__()
        self.source = model
        self.optimizer = optimizer
        self.schedule = schedule
        self.groups = groups
        self.adapter = adapter
        self.loss: TokenLoss = loss or ChunkedCrossEntropy()
        self.activation_checkpointing = activation_checkpointing
        self.compile_model = compile
        self.seed = seed
        self.model: Any = None  # configure_model sets a PreTrainedModel or PeftModel
        self.limits: Limits | None = None  # setup finds them, before the weights are loaded
        # Not a MeanMetric, which skips NaN: a validation would look better than it is.
        self.val_loss_sum = SumMetric(nan_strategy="disable")
        self.val_targets = SumMetric(nan_strategy="disable")
        self.val_router_sum = SumMetric(nan_strategy="disable")
        self._token_mean = TokenMean(self._sum_over_ranks)
        self._router_sum: Tensor | None = None  # of the global batch; None without a router's loss
        self._val_has_router = False
        self._sums_by_loader: Tensor | None = None  # of loss and targets, [loaders, 2]
        self._options: list[dict[str, Any]] = []
        self._unchecked = {"model", "loss", "packing of one row", "packing of rows"}

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's tokenizer, or None if it has none."""
        self.source.check()
        return self.source.load_tokenizer()

    def setup(self, stage: str) -> None:
        """Check the settings before the model is loaded, so that wrong ones fail early.

        Raises:
            Misconfiguration: If the run combines settings that cannot work together, or if the
                optimizer, its groups or the schedule do not accept their options.
            Refusal: If the adapter names layers that the model has not, or if the model has no row
                for a token or a position of the examples.
        """
        parts = PARTS if stage == "fit" else ("module", "galore")
        plan = check_run(self.trainer, self, parts=parts)
        self.source.check()
        self.try_optimizer(in_subspaces=plan.basis is not None)
        if "model" in self._unchecked:
            self._unchecked.discard("model")
            self._compare_with_model()

    def _compare_with_model(self) -> None:
        """Hold the adapter and the examples against the model, whose weights are not loaded yet."""
        empty = self.source.build_empty()
        self.limits = limits_of(empty)
        if self.adapter is not None:
            match_names(empty, self.adapter)
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, KnowsExamples):
            self.limits.hold_examples(data, self.source)

    def plan_facts(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """Return what is known about optimizer, adapter and model before they are built."""
        facts: dict[str, Any] = {
            "adapter": adapter_of(self.adapter),
            "quantised": isinstance(self.source, Quantizes)
            and self.source.quantization_config is not None,
            "compiled": self.compile_model,
        }
        kind = class_of(self.optimizer)
        if kind is not None:
            facts |= {"optimizer": kind.__name__, "traits": traits_of(kind)}
        return facts

    def try_optimizer(self, *, in_subspaces: bool) -> None:
        """Build the optimizer and its schedule on stand-ins, so that bad options fail now."""
        stand_ins = [
            {**rule.options, "params": [torch.nn.Parameter(torch.zeros(2, 2))]}
            for rule in self.groups
        ]
        try:
            optimizer = self.optimizer(stand_ins)
            if self.schedule and not traits_of(type(optimizer)).own_rate:
                self.schedule(optimizer, 100)
            if in_subspaces:
                check_steps_from_zero(optimizer)
        except (TypeError, ValueError, RuntimeError) as error:
            remedies = error.remedies if isinstance(error, Refusal) else ()
            why = error.why if isinstance(error, Refusal) else str(error).rstrip(".")
            raise Misconfiguration(f"optimizer, groups or schedule: {why}", *remedies) from error

    def configure_model(self) -> None:
        """Load the model once, in the precision and on the device that the strategy sets."""
        if self.model is not None:
            return
        dtype = torch.get_default_dtype()
        with stage("loading the model"):
            if self.device_mesh is None:
                self._take(self.source.load_model(dtype))
            else:  # `_shard` sets `self.model`; loading then leaves it in evaluation mode
                self.source.load_model(dtype, shard=self._shard)
                model: Any = self.model
                start_magnitudes(model.train())

    def shard_model(self) -> None:
        """Shard `self.model` over the ranks; `GaLore` injects its layers just before this runs."""
        assert isinstance(self.trainer.strategy, FSDP2Strategy | TensorParallelStrategy)
        self.trainer.strategy.shard(unwrap_peft(self.model))

    def _shard(self, model: Any) -> None:
        if self.adapter is not None and getattr(model, "is_quantized", False):
            # `setup` knows of requested quantisation, not of a model that was saved quantised.
            check_run(self.trainer, self, quantised=True)
        self._take(model)
        self.shard_model()

    def _take(self, model: Any) -> None:
        if self.activation_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        if self.adapter is not None:
            # The adapter gets the same values on all ranks, whatever their number and device.
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                torch.default_generator.manual_seed(self.seed)
                model = add_adapter(model, self.adapter)
        self.model = model.train()
        if self.compile_model:
            unwrap_peft(model).base_model.compile()

    def configure_optimizers(self) -> Any:
        """Build the optimizer from the groups, and its schedule for the trainer's steps."""
        named = self.named_parameters(remove_duplicate=False)  # a rule may match any name
        optimizer: Any = build_optimizer(self.optimizer, named, self.groups)
        optimizer = row_chunked(stochastically_rounded(optimizer, seed=self.seed))
        self._options = options_of(optimizer)
        if hasattr(self.trainer.precision_plugin, "scaler"):
            # A fused optimizer would remove float16's loss scale in its kernel, after clipping.
            # This makes the trainer remove it before clipping. In bfloat16 there is no scale, but
            # Lightning would not clip by value all the same.
            optimizer._step_supports_amp_scaling = False
        if self.schedule is None or traits_of(type(optimizer)).own_rate:
            return optimizer
        resumes = self.trainer.ckpt_path is not None
        length = LENGTH_UNKNOWN if resumes else self.trainer.estimated_stepping_batches
        scheduler = self.schedule(optimizer, length)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_train_start(self) -> None:
        """Give a resumed run the learning rate, weight decay and schedule of its settings.

        A schedule needs the length of the run. A run of epochs takes it from its data, which must
        not be set up before Lightning has restored the place in them: it would begin the epoch
        again (https://github.com/Lightning-AI/pytorch-lightning/issues/20550).
        """
        if self.trainer.ckpt_path is None:
            return
        [optimizer] = self.trainer.optimizers
        changed = obey_options(optimizer, self._options)
        if changed:
            rank_zero_info(f"Unlike the checkpoint's run: {', '.join(changed)}.")
        for config in self.trainer.lr_scheduler_configs:
            assert self.schedule is not None
            config.scheduler = rebuilt(
                self.schedule, optimizer, self.trainer.estimated_stepping_batches, config.scheduler
            )

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Make dropout depend only on seed, rank and batch, so that a resumed run repeats it."""
        # A saved random state would not include what loaders and validations draw in between. The
        # batches are counted over all epochs: where a stream's epoch ends is known only afterwards.
        key = (self.seed, self.global_rank, self.trainer.fit_loop.total_batch_idx)
        torch.manual_seed(keyed_generator(torch.device("cpu"), *key).initial_seed())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return this micro-batch's part of the loss of the global batch."""
        loss_sum, router_sum, num_targets = self._loss_sums(batch)
        if router_sum is not None:
            before = 0 if self._router_sum is None else self._router_sum
            self._router_sum = before + router_sum
        _, shares = data_parallel_rank(self.trainer)
        loss = self._token_mean.add(loss_sum, num_targets, alone=shares == 1)
        # Lightning divides the loss by the number of micro-batches, and data parallelism divides
        # the gradients by the number of ranks.
        return loss * (self.trainer.accumulate_grad_batches * shares)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step, then free the gradients, which Lightning would keep in the next forward pass."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Turn the accumulated gradient into that of the mean loss over the target tokens.

        Raises:
            NotFinite: If the loss of the global batch is not finite, unless a callback has given
                the step up and left no gradient.
        """
        loss, num_targets = self._token_mean.finish(self.parameters())
        if not math.isfinite(loss):
            self._router_sum = None
            if any(p.grad is not None for p in self.parameters()):
                raise of_loss(self.global_step)
            return
        if self._router_sum is not None:
            router = self._sum_over_ranks(self._router_sum) / max(num_targets, 1)
            self._router_sum = None
            self.log("train_router_loss", router.float())
            loss = loss - router
        self.log("train_loss", loss.float(), prog_bar=True)

    @clips_as_lightning_does
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as Lightning does, and log the gradient norm if it is computed for clipping."""
        if not gradient_clip_val or gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)
        self.log("grad_norm", full_tensor(norm))

    def on_validation_epoch_start(self) -> None:
        """Reset the sums from which the validation loss is computed."""
        self._val_has_router = False
        for metric in (self.val_loss_sum, self.val_targets, self.val_router_sum):
            # bf16-true makes the metric's sum bfloat16, which stops growing at 256 targets.
            metric.set_dtype(torch.float32 if self.device.type == "mps" else torch.float64)
            # Reset here, not at the end: `validate` runs in inference mode and `fit` does not, and
            # a tensor made in one cannot be updated in the other.
            metric.reset()
        loaders = len(self._val_names())
        self._sums_by_loader = (
            torch.zeros(loaders, 2, device=self.device, dtype=self.val_loss_sum.dtype)
            if loaders > 1
            else None
        )

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add the batch's loss and its number of targets to the sums."""
        loss_sum, router_sum, num_targets = self._loss_sums(batch)
        if router_sum is not None:
            self._val_has_router = True
            self.val_router_sum.update(router_sum)
            loss_sum = loss_sum - router_sum
        self.val_loss_sum.update(loss_sum)
        self.val_targets.update(num_targets)
        if self._sums_by_loader is not None:
            self._sums_by_loader[dataloader_idx, 0] += loss_sum
            self._sums_by_loader[dataloader_idx, 1] += num_targets

    def on_validation_epoch_end(self) -> None:
        """Log the mean loss over the target tokens of all batches and ranks.

        It is logged at the number of optimizer steps that the weights have taken.
        """
        if self.trainer.state.fn == TrainerFn.FITTING:
            # Lightning takes it as the step. Its own number counts from 0, and so lags behind.
            self.log("step", float(self.trainer.global_step))
        loss = self.val_loss_sum.compute() / self.val_targets.compute()
        self.log_dict({"val_loss": loss, "val_perplexity": loss.exp()}, prog_bar=True)
        if self._val_has_router:
            router = self.val_router_sum.compute() / self.val_targets.compute()
            self.log("val_router_loss", router)
        if self._sums_by_loader is not None:
            sums = self._sum_over_ranks(self._sums_by_loader).tolist()
            for name, (loss_sum, targets) in zip(self._val_names(), sums, strict=True):
                if targets:  # limit_val_batches may leave a loader no example
                    self.log(f"val_loss/{name}", loss_sum / targets)

    def _val_names(self) -> list[str]:
        """Return a name for each validation loader: of its source, or else its number."""
        loaders = len(self.trainer.num_val_batches)
        data = getattr(self.trainer, "datamodule", None)
        names = list(data.val_names) if isinstance(data, NamesValidation) else []
        return names if len(names) == loaders else [str(number) for number in range(loaders)]

    def loss_sum(self, batch: Batch) -> tuple[Tensor, int]:
        """Return the loss summed over the batch's target tokens, and their number.

        Args:
            batch: The batch, with `input_ids` and `labels` [B, T]. It may also have
                `attention_mask` and `position_ids` [B, T], and `num_targets`, the number of
                targets.
        """
        loss, _, num_targets = self._loss_sums(batch)
        return loss, num_targets

    def _loss_sums(self, batch: Batch) -> tuple[Tensor, Tensor | None, int]:
        """Return the batch's loss, the router's part in it (or None), and the number of targets."""
        inputs = {
            k: batch[k] for k in ("input_ids", "attention_mask", "position_ids") if k in batch
        }
        labels = batch["labels"]
        self._probe_model_on(inputs)
        num_targets = batch.get("num_targets")
        if num_targets is None:
            num_targets = int((labels[:, 1:] != IGNORE_INDEX).sum())
        arguments = (self.model, inputs, labels)
        if type(self.loss) is ModelLoss:  # a subclass may compute another loss
            both = with_root_gathered(self.model, self.loss.with_router, *arguments)
            return *both, num_targets
        loss = with_root_gathered(self.model, self.loss, *arguments)
        return loss, None, num_targets

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out the frozen weights under an adapter, which are loaded with the model."""
        frozen = self._reloadable()
        checkpoint["state_dict"] = {
            name: value
            for name, value in checkpoint["state_dict"].items()
            if not name.startswith(frozen)
        }

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a checkpoint, which may leave out the frozen weights under an adapter.

        Raises:
            RuntimeError: If the checkpoint belongs to another model or adapter.
        """
        frozen = self._reloadable()
        if not frozen:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = [name for name in result.missing_keys if not name.startswith(frozen)]
        if strict and (missing or result.unexpected_keys):
            raise RuntimeError(
                "The checkpoint is of another model or adapter: "
                f"missing {missing[:3]}, unexpected {result.unexpected_keys[:3]}."
            )
        return result

    def _reloadable(self) -> tuple[str, ...]:
        """Return the names of the frozen weights that `configure_model` can load again exactly."""
        if not isinstance(self.model, PeftModel) or rewrites_base_weights(self.model):
            return ()
        return tuple(
            name for name, p in self.named_parameters(remove_duplicate=False) if not p.requires_grad
        )

    def skip_probes(self) -> None:
        """Take the model to be as the loss and packing assume, where it has no values to probe."""
        self._unchecked.clear()

    def _probe_model_on(self, inputs: Mapping[str, Tensor]) -> None:
        """Check what the loss and packing assume of the model, on the first batch that shows it."""
        if "loss" in self._unchecked:
            self._unchecked.discard("loss")
            row = inputs["input_ids"][:1, :64]
            if isinstance(self.loss, ChunkedCrossEntropy) and not with_root_gathered(
                self.model, self.loss.is_exact_for, self.model, row
            ):
                rank_zero_info(
                    f"{self.source.name} transforms its logits or adds losses: training on its own "
                    "loss, with the [tokens, vocabulary] logits in memory."
                )
                self.loss = ModelLoss()
        rows = len(inputs["input_ids"])
        of_rows = "packing of rows" if rows > 1 else "packing of one row"
        if of_rows in self._unchecked and "position_ids" in inputs:
            self._unchecked.discard(of_rows)
            if not keeps_packed_examples_apart(
                self.model, inputs["input_ids"][0], inputs["position_ids"][0], rows=rows
            ):
                raise Misconfiguration(
                    f"{self.source.name} lets packed examples see each other in batches of {rows}",
                    remedies.NO_PACKING,
                    remedies.OTHER_ATTENTION,
                    remedies.ROW_BY_ROW,
                )

    def _sum_over_ranks(self, tensor: Tensor) -> Tensor:
        _, shares = data_parallel_rank(self.trainer)
        if shares == 1:
            return tensor
        return self.trainer.strategy.reduce(tensor, reduce_op="sum")
