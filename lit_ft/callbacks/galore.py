"""GaLore for any LightningModule: its optimizer trains whole weights in subspaces."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    LearningRateFinder,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lit_ft.callbacks._support.compiled import is_compiled
from lit_ft.callbacks._support.trainer import callbacks_of, loss_scaler, network_of, only_optimizer
from lit_ft.compat.plan import Basis
from lit_ft.compat.protocols import LoadsAfterSharding, ShardsModel
from lit_ft.compat.ranges import Count, Positive, WholeNumber
from lit_ft.compat.refusal import Remedy
from lit_ft.distributed.plan import Misconfiguration, check_run
from lit_ft.subspace import (
    MATCH_ADAMW,
    Refresh,
    SubspaceLayer,
    SubspaceUpdater,
    inject,
    keep_out_of_broadcasts,
    subspace_layers,
    targeted,
)
from lit_ft.subspace.checks import check_settings
from lit_ft.subspace.layers.base import Sides
from lit_ft.subspace.projectors import Oja, Projector
from lit_ft.tensors.sharding import is_sharded
from lit_ft.terminal import stage


class GaLore(Callback):
    """Turn the module's optimizer into its GaLore version: full-parameter training in subspaces.

    The matrices of the targeted layers are frozen for autograd. In the optimizer that the module
    builds, a small parameter takes the place of each matrix. After each step, the small parameter
    is added to its matrix through the basis, and set back to zero. The learning rate has the same
    meaning as without GaLore.

    A module that shards its model (under `ModelParallelStrategy`) must do so in a method named
    `shard_model`, and call it from `configure_model`. The callback then injects its layers just
    before `shard_model` runs. Alternatively, the module can call `lit_ft.subspace.inject` itself,
    before `fully_shard`.

    A checkpoint holds the complete weights, and also the small parameters and their bases. A module
    without this callback can load it with `strict=False`, and then continues as an ordinary module.

    A weight gets a gradient only where its layer is called. It gets none where it is used directly,
    for example by a head that is tied by hand with `F.linear(x, embedding.weight)`.

    Args:
        rank: The rank of the subspaces, usually a quarter of the hidden size or less.
        projector: The rule that moves the bases; None for `Oja()`, online subspace descent.
        targets: The layers to train in subspaces: "all", any of "attention", "mlp", "embeddings"
            and "head", or regular expressions to search for in the names of layers.
        side: The side of a matrix that a basis spans: the layer's inputs ("right"), its outputs
            ("left") or the shorter of the two ("std"). The shorter side captures more of the
            gradient and takes more memory.
        scale: The factor α by which a step in the subspace is multiplied: a number (0.25 in
            GaLore's paper), or "match_adamw" to choose it for each layer. That choice is
            √(cols / rank), but 1 for embeddings, for layers tied to them and for the head of a
            transformers model. With SGD it is 1, and with Muon the ratio of the updates' norms.
        seed: The seed of the bases that training starts from, and of stochastic rounding.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> model = BoringModel()  # one layer, of 32 inputs and 2 outputs
        >>> trainer = L.Trainer(
        ...     callbacks=[GaLore(rank=1)], max_steps=2, accelerator="cpu", barebones=True
        ... )
        >>> trainer.fit(model)
        >>> model.layer.weight.shape, model.layer.delta.shape
        (torch.Size([2, 32]), torch.Size([2, 1]))
    """

    def __init__(
        self,
        rank: Count = 128,
        projector: Projector | None = None,
        *,
        targets: str | Sequence[str] = "all",
        side: Sides = "right",
        scale: Positive | Literal["match_adamw"] = MATCH_ADAMW,
        seed: WholeNumber = 0,
    ) -> None:
        self.rank = rank
        self.projector = projector or Oja()
        check_settings(every=self.projector.every, scale=scale)
        self.targets = targets
        self.side = side
        self.scale = scale
        self.seed = seed
        self.verbose = True  # False leaves it to a `StartTable` to describe the subspaces
        self.updater: SubspaceUpdater | None = None
        self._refresh: Refresh | None = None
        self._handle: RemovableHandle | None = None
        self._module: LightningModule | None = None  # the one whose layers are injected
        self._wrapped: dict[str, Callable[..., Any]] = {}  # what replaces its methods, by name

    def reschedule(self, refresh: Refresh) -> None:
        """Move the bases at the steps that `refresh` sets; call this before training starts."""
        self._refresh = refresh
        if self.updater is not None:
            self.updater.reschedule(refresh)

    @property
    def projector_in_force(self) -> Projector:
        """The projector, with the interval that `SubspaceRefresh` sets in place of its own."""
        every = self._refresh.every if self._refresh is not None else None
        rule: Any = self.projector
        found: Projector = rule if every is None else replace(rule, every=every)
        return found

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Inject the layers now, or arrange for it if the model does not exist yet.

        In the second case, the layers are injected just before `shard_model`, or else after
        `configure_model`.

        Raises:
            Misconfiguration: If the module, the strategy or another callback does not work with
                GaLore.
        """
        own = self.plan_facts(trainer, pl_module)
        check_run(trainer, pl_module, parts=["galore"], **own)
        if _is_averaged(trainer):
            for layer in subspace_layers(pl_module).values():  # an earlier fit may have released it
                layer.store_delta()
        if self._module is pl_module:
            assert self.updater is not None
            self.updater.freeze_weights()
            return
        self.updater = None  # it may be that of another module, trained before
        if not is_overridden("configure_model", pl_module, parent=LightningModule):
            self._inject(pl_module)
            return
        configure_model = pl_module.configure_model

        def inject_once() -> None:
            if self._module is not pl_module:
                self._inject(pl_module)

        def configure_model_and_inject() -> None:
            configure_model()
            inject_once()

        self._wrapped = {"configure_model": configure_model_and_inject}
        if isinstance(pl_module, ShardsModel):
            self._wrapped["shard_model"] = _after(inject_once, pl_module.shard_model)
        vars(pl_module).update(self._wrapped)

    def _inject(self, module: LightningModule) -> None:
        model = network_of(module)
        layers = subspace_layers(model)  # the module may have injected them itself
        self._compare(model, layers)
        with stage("preparing the subspaces"):
            layers = layers or inject(
                model,
                rank=self.rank,
                targets=self.targets,
                side=self.side,
                seed=self.seed,
                # CausalLMModule, for example, loads its weights one by one after sharding.
                allow_meta=isinstance(module, LoadsAfterSharding) and module.loads_after_sharding,
            )
        keep_out_of_broadcasts(module)
        self.updater = SubspaceUpdater(
            layers,
            self.projector,
            scale=self.scale,
            refresh=self._refresh,
            compiled=is_compiled(module),
            seed=self.seed,
            all_reduce=_average,
        )
        self.updater.freeze_weights()  # an earlier callback may have unfrozen them
        self._module = module
        if self.verbose:
            small = sum(layer.delta.numel() for layer in layers.values())
            whole = sum(layer.weight.numel() for layer in layers.values())
            rank_zero_info(
                f"GaLore: {whole:,} weights of {len(layers)} layers move through {small:,} "
                f"parameters ({small / whole:.1%}), rank {self.rank}, {self.projector_in_force}."
            )

    def _compare(self, model: torch.nn.Module, found: Mapping[str, SubspaceLayer]) -> None:
        """Raise Misconfiguration if what the module has done does not fit this callback.

        The module may have injected layers with other settings, or sharded the model before any
        layer was injected.

        Args:
            model: The model, as its module has built it.
            found: The layers that the module has injected itself, keyed by name.
        """
        if not found and any(is_sharded(weight) for weight in model.parameters()):
            raise Misconfiguration(
                "The model was sharded before GaLore's layers were injected",
                Remedy("shard in a method shard_model, which configure_model calls"),
                Remedy(f"call inject(model, rank={self.rank}) before fully_shard"),
            )
        same = Remedy("give inject() and GaLore the same settings")
        for name, layer in found.items():
            if layer.rank != min(self.rank, *layer.weight.shape):
                raise Misconfiguration(
                    f"{name} was injected with rank={layer.rank}, GaLore has rank={self.rank}", same
                )
            if layer.side != layer.side_of(self.side, self.rank):
                raise Misconfiguration(
                    f"{name} was injected with side={layer.side}, GaLore has side={self.side}", same
                )
        injected = {n for n, m in model.named_modules() if isinstance(m, SubspaceLayer)}
        if found and (differing := sorted(injected ^ targeted(model, self.targets).keys())):
            raise Misconfiguration(
                f"inject() and GaLore have other targets, such as {differing[0]}", same
            )

    def plan_facts(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """Return what the projector needs, and facts of the run that may rule out GaLore."""
        callbacks = callbacks_of(trainer)
        ahead = takewhile(lambda callback: callback is not self, callbacks)
        copies = (c for c in ahead if isinstance(c, WeightAveraging | StochasticWeightAveraging))
        copied = next(copies, None)
        mesh = module.device_mesh
        cuts_layers = isinstance(mesh, DeviceMesh) and mesh["tensor_parallel"].size() > 1
        return {
            # Lightning's ModelParallelStrategy does not say how the module is split. Its mesh does.
            **({"parallel": "tensor"} if cuts_layers else {}),
            "basis": Basis(type(self.projector).__name__, self.projector.forms_gradients),
            "copied_before_galore": None if copied is None else type(copied).__name__,
            "finds_rate": any(isinstance(c, LearningRateFinder) for c in callbacks),
        }

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach the updater to the optimizer."""
        optimizer = only_optimizer(trainer, self)
        assert self.updater is not None
        # Other ranks are not asked.
        self.updater.releases_deltas = trainer.world_size == 1 and not _is_averaged(trainer)
        self._handle = self.updater.attach(optimizer)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Under manual optimization, begin a new accumulation if the gradients were zeroed.

        Lightning has no hook for zeroing there, so this looks at the gradients themselves.
        """
        assert self.updater is not None
        layers = self.updater.layers.values()
        if not pl_module.automatic_optimization and all(x.delta.grad is None for x in layers):
            self.updater.begin_accumulation()

    def on_before_zero_grad(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Begin a new accumulation of gradients over micro-batches."""
        assert self.updater is not None
        self.updater.begin_accumulation()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Check the gradients of this step, and move the bases that are computed from them."""
        assert self.updater is not None
        self.updater.before_step(optimizer, skips_overflow=loss_scaler(trainer) is not None)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detach from the optimizer, and restore the module's methods."""
        self._detach(pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Detach from the optimizer, and restore the module's methods."""
        self._detach(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs in addition to the model's own tensors."""
        made_with = {"rank": self.rank, "side": self.side, "projector": self._rule}
        steps = None if self.updater is None else self.updater.state_dict()
        return {"made_with": made_with, "steps": steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint.

        Raises:
            Misconfiguration: If the checkpoint was made with another rank, side or projector.
        """
        for name, saved in state_dict["made_with"].items():
            current = self._rule if name == "projector" else getattr(self, name)
            if current != saved:
                raise Misconfiguration(
                    f"The checkpoint was made with {name}={saved}, this run has {name}={current}, "
                    "and its bases and moments do not fit",
                    Remedy("use the same settings"),
                    Remedy("start from its exported weights"),
                )
        if self.updater is not None and state_dict["steps"] is not None:
            self.updater.load_state_dict(state_dict["steps"])

    @property
    def _rule(self) -> str:
        """The projector as text, without its interval. A new interval only restarts the turns."""
        settings = {k: v for k, v in vars(self.projector).items() if k != "every"}
        listed = ", ".join(f"{name}={value}" for name, value in settings.items())
        return f"{type(self.projector).__name__}({listed})"

    def _detach(self, module: LightningModule) -> None:
        for name, own in self._wrapped.items():
            if vars(module).get(name) is own:
                del vars(module)[name]
        self._wrapped.clear()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if self.updater is not None:
            self.updater.stop()


def _after(first: Callable[[], None], hook: Callable[..., Any]) -> Any:
    def both(*args: Any, **kwargs: Any) -> Any:
        first()
        return hook(*args, **kwargs)

    return both


def _average(tensors: Sequence[Tensor]) -> None:
    if dist.is_available() and dist.is_initialized():
        # All reductions run at once, because there are many small tensors.
        works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
        for tensor, work in zip(tensors, works, strict=True):
            assert work is not None
            work.wait()
            tensor /= dist.get_world_size()


def _is_averaged(trainer: Trainer) -> bool:
    """Whether a callback writes an average to all parameters."""
    averages = (WeightAveraging, StochasticWeightAveraging)
    return any(isinstance(one, averages) for one in callbacks_of(trainer))
