"""Block updates for any LightningModule: a few blocks of the model are trained at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lit_ft.callbacks._support.trainer import network_of, only_optimizer, total_steps
from lit_ft.compat import remedies
from lit_ft.compat.ranges import Count, WholeNumber
from lit_ft.compat.refusal import Refusal
from lit_ft.distributed.plan import Misconfiguration, check_run
from lit_ft.optim.blocks import (
    ORDERS,
    BlockOrder,
    BlockTurns,
    Order,
    frozen,
    largest_blocks,
    usual_stay,
)
from lit_ft.optim.model_blocks import ModelBlocks, model_blocks
from lit_ft.optim.narrowed import narrowed

State = Literal["drop", "keep"]
_STATES: tuple[State, ...] = get_args(State)
_SHORT_STAY = 10  # steps: AdamW's moments are still those of a few gradients


class BlockUpdate(Callback):
    """Train a few blocks of the model at a time, in turns, with the module's own optimizer.

    Gradients and, with `state="drop"`, optimizer state exist for the active blocks alone, and
    backward stops below the lowest of them. In a cycle each block is active once. With the default
    settings this is BAdam (arXiv:2404.02827). With `always=["embeddings", "head"]` it is close to
    LISA (arXiv:2403.17919), which draws new blocks for each turn and knows no cycles.

    The blocks are the layers of a transformer, or the members of the largest ModuleList or
    Sequential of modules of one class. The embeddings are a block of their own, and so is the head,
    together with what is in no other block, such as the last norm. A head that is tied to the
    embeddings is in their block. A tower without the input embeddings, such as one for images, is
    in no block: text does not train it, and a loss that depends on it trains it in every step.

    Which blocks are active depends on the seed and the number of the step alone. So all ranks
    agree, a resumed run repeats the uninterrupted one bit for bit, and with accumulation the
    gradients of a step are those of the same blocks. Clipping by norm sees the active gradients.
    A module that checkpoints activations must do so with `use_reentrant=False`.

    Args:
        every: The number of optimizer steps for which blocks stay active; None divides the run
            among the blocks, at most 100 steps each.
        active: The number of blocks that are active at a time.
        order: The order of the blocks in a cycle: "random" for another permutation in each cycle,
            "ascending" from the embeddings to the head, or "descending".
        always: The parameters that are trained in every step: "embeddings", "head", or regular
            expressions to search for in the names of parameters; None for none.
        state: The fate of a block's optimizer state when its turn ends: "drop" frees it, so that
            each turn starts from zero, and "keep" keeps it on the device for the next turn.
        seed: The seed of the random order.

    Raises:
        ValueError: If an argument is of a wrong type or out of its range.
        Misconfiguration: If block updates would be wrong or save nothing: with GaLore, an adapter,
            DDP, torch.compile, manual optimization, or an optimizer that needs all parameters in a
            step. Also, before training begins, if the model has no repeated blocks, or no more of
            them than are active, and in a step whose loss does not depend on the active blocks.

    Example:
        >>> import lightning as L
        >>> blocks = BlockUpdate(every=50, active=2)
        >>> trainer = L.Trainer(callbacks=[blocks], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        every: Count | None = None,
        active: Count = 1,
        *,
        order: Order = "random",
        always: str | Sequence[str] | None = None,
        state: State = "drop",
        seed: WholeNumber = 0,
    ) -> None:
        numbers: tuple[tuple[str, Any, int], ...] = (
            ("every", 1 if every is None else every, 1),
            ("active", active, 1),
            ("seed", seed, 0),
        )
        for name, number, least in numbers:
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise ValueError(
                    f"{name} must be a whole number of at least {least}, not {number!r}"
                )
        for name, choice, choices in (("order", order, ORDERS), ("state", state, _STATES)):
            if choice not in choices:
                raise ValueError(
                    f"{name} must be {' or '.join(map(repr, choices))}, not {choice!r}"
                )
        self.every = every
        self.active = active
        self.order = order
        self.always = _patterns(always)
        self.state = state
        self.seed = seed
        self._turns: BlockTurns | None = None
        self._saved: dict[str, Any] = {}  # of a checkpoint: what `state_dict` returned
        self._plans = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse unsupported combinations before the model is loaded."""
        if stage == "fit":
            self._saved = {}  # it may be that of another fit
            own = self.plan_facts(trainer, pl_module)
            check_run(trainer, pl_module, parts=["blocks"], **own)

    def plan_facts(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """Return that blocks take turns, and whether the module steps its optimizer itself."""
        return {
            "blocks": True,
            "drops_state": self.state == "drop",
            "optimizes_by_hand": not module.automatic_optimization,
        }

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the blocks, so that a model without them is refused before anything is trained."""
        self._find(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach to the optimizer, and say how often blocks change."""
        optimizer = only_optimizer(trainer, self)
        found = self._find(pl_module)
        held = {p for group in optimizer.param_groups for p in group["params"]}
        blocks = {name: [p for p in ps if p in held] for name, ps in found.blocks.items()}
        blocks = {name: parameters for name, parameters in blocks.items() if parameters}
        steps = total_steps(trainer)
        order = self._order(len(blocks), steps)
        self._turns = BlockTurns(optimizer, blocks, order, drop_state=self.state == "drop")
        if "turns" in self._saved:
            self._turns.load_state_dict(self._saved["turns"])
        if self._plans:
            self._hold_largest(optimizer)
        else:
            self._tell(order, steps)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Activate the blocks of this step, if it is the first of their turn."""
        # Not in `on_train_start`: other callbacks attach to the parameters there, and can do so
        # only while they require a gradient.
        assert self._turns is not None
        if not self._plans:
            self._turns.begin_step(trainer.global_step)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Refuse a loss that trains nothing, which backward would not explain."""
        if loss.requires_grad:
            return
        assert self._turns is not None
        blocks = self._turns.blocks.items()
        active = [repr(name) for name, held in blocks if any(p.requires_grad for p in held)]
        raise Misconfiguration(
            f"BlockUpdate: the loss of step {trainer.global_step} does not depend on the active "
            f"block{'s' * (len(active) > 1)} {', '.join(active)}",
            remedies.FREEZE_UNUSED,
            remedies.NO_BLOCKS,
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let all parameters require a gradient again."""
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let all parameters require a gradient again, and let go of the optimizer."""
        self._release()
        self._saved = self.state_dict()  # for a checkpoint that is saved after the fit
        self._turns = None

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Let all parameters require a gradient again."""
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """Return the length of a turn, and the turn that the optimizer's state belongs to."""
        if self._turns is None:
            return self._saved
        return {"every": self._turns.order.every, "turns": self._turns.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint.

        If `every` is None, turns stay as long as they were. Other settings than those of the
        checkpoint's run take effect at once, and a turn that they begin starts from zero.
        """
        self._saved = dict(state_dict)

    def described(self, module: LightningModule, steps: float) -> str:
        """Return what takes turns, as in "2 of 30 blocks at a time, for 20 steps each".

        Args:
            module: The module. All of its parameters that are to be trained require a gradient.
            steps: The number of steps of the run; infinity if nobody knows it.
        """
        found = self._find(module)
        every = self._order(len(found.blocks), steps).every
        told = f"{self.active} of {len(found.blocks)} blocks at a time, for {every:,} step"
        told += f"{'s' * (every > 1)} each, {self.order}"
        if self.always:
            told += f"; always {', '.join(self.always)}"
        return f"{told}; state is {'dropped' if self.state == 'drop' else 'kept'}"

    @contextmanager
    def largest_active(self, module: LightningModule) -> Iterator[None]:
        """Let only what can have optimizer state at a time require a gradient inside the block.

        Of all turns, it is the one of the largest blocks.
        """
        found = self._find(module)
        largest = largest_blocks(found.blocks, self.active)
        others = [p for name, ps in found.blocks.items() if name not in largest for p in ps]
        with frozen(others if self.state == "drop" else ()):
            yield

    def plan_for_largest(self) -> None:
        """Train the largest blocks alone, as a plan of a run's memory must."""
        self._plans = True

    def _find(self, module: LightningModule) -> ModelBlocks:
        model = network_of(module)
        try:
            found = model_blocks(model, self.always)
        except Refusal as error:
            raise Misconfiguration(f"BlockUpdate: {error.why}", *error.remedies) from error
        count, name = len(found.blocks), type(model).__name__
        if count <= self.active:
            blocks = f"all {count} blocks" if count > 1 else "the only block"
            why = f"active={self.active} keeps {blocks} of {name} active"
            if self.always:
                why += ", apart from what always covers"
            raise Misconfiguration(
                why,
                *([remedies.FEWER_ACTIVE] if count > 1 else []),
                *([remedies.FEWER_ALWAYS] if self.always else []),
                remedies.NO_BLOCKS,
            )
        return found

    def _order(self, num_blocks: int, steps: float) -> BlockOrder:
        order = BlockOrder(num_blocks, 1, self.active, self.order, self.seed)
        every = self.every or self._saved.get("every") or usual_stay(steps, order.stays)
        return BlockOrder(num_blocks, every, self.active, self.order, self.seed)

    def _tell(self, order: BlockOrder, steps: float) -> None:
        needed = order.stays * order.every
        if steps < needed:
            rank_zero_warn(
                f"The run ends at step {steps:,.0f}, and it takes {needed:,} until each of its "
                f"{order.num_blocks} blocks has been trained: {_what_helps(order)}."
            )
        elif order.every < _SHORT_STAY and self.state == "drop":
            rank_zero_info(
                f"Block updates: {order.every} steps are few for a block whose optimizer state "
                "starts from zero. More steps, or more blocks at a time (active), train it longer."
            )

    def _hold_largest(self, optimizer: Optimizer) -> None:
        assert self._turns is not None
        blocks = self._turns.blocks
        if self.state == "keep":  # after the first cycle, all blocks have their state
            held = [p for parameters in blocks.values() for p in parameters]
            # The largest comes last, so that the peak is there for a model of any depth.
            for parameter in sorted(held, key=lambda p: p.numel() * p.itemsize):
                parameter.grad = torch.zeros_like(parameter)
                with narrowed(optimizer, parameter):
                    optimizer.step()
                parameter.grad = None
        largest = largest_blocks(blocks, self.active)
        for name, parameters in blocks.items():
            for parameter in parameters:
                parameter.requires_grad_(name in largest)

    def _release(self) -> None:
        if self._turns is not None:
            self._turns.release()


def _what_helps(order: BlockOrder) -> str:
    """Return what lets a run reach all of its blocks, as a phrase."""
    ways = ["raise max_steps"]
    if order.active + 1 < order.num_blocks:
        ways.insert(0, f"raise active={order.active}")
    if order.every > 1:
        ways.insert(0, f"lower every={order.every}")
    *first, last = ways
    return f"{', '.join(first)}, or {last}" if first else last


def _patterns(always: Any) -> tuple[str, ...]:
    """Return the entries of `always`; raise ValueError if one is no regular expression."""
    if always is None:
        return ()
    if not isinstance(always, Iterable):
        raise ValueError(f"always must be a list of texts, not {always!r}")
    entries = [always] if isinstance(always, str) else list(always)
    for entry in entries:
        if not isinstance(entry, str):
            raise ValueError(f"always must be a list of texts, and {entry!r} is none")
        if not entry:
            raise ValueError("an entry of always is an empty text, which fits every parameter")
        try:
            re.compile(entry)
        except re.error as error:
            raise ValueError(f"always={entry!r} is not a regular expression: {error}") from error
    return tuple(entries)
