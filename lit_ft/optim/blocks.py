"""Train a few blocks of a model at a time, in turns, with one optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_ft.compat.optimizers import traits_of, unwrapped
from lit_ft.compat.plan import Plan
from lit_ft.compat.rules import check
from lit_ft.optim.rounded import begin_stay
from lit_ft.tensors.stochastic_rounding import keyed_generator

Order = Literal["random", "ascending", "descending"]
ORDERS: tuple[Order, ...] = get_args(Order)
_LONGEST_STAY = 100  # steps; the BAdam paper trains each block for 100


@dataclass(frozen=True)
class BlockOrder:
    """Says which blocks are active at a step: a function of the step alone, the same on all ranks.

    The steps are cut into stays of `every` steps. A cycle is as many stays as it takes until each
    block has been active once; its last stay has the blocks that are left over. "random" draws a
    permutation of the blocks for each cycle.

    Attributes:
        num_blocks: The number of blocks.
        every: The number of optimizer steps in a stay.
        active: The number of blocks that are active at a time.
        order: The order of the blocks in a cycle.
        seed: The seed of the permutations.
    """

    num_blocks: int
    every: int
    active: int = 1
    order: Order = "random"
    seed: int = 0

    @property
    def stays(self) -> int:
        """The number of stays in a cycle."""
        return -(-self.num_blocks // self.active)

    def at(self, step: int) -> tuple[int, tuple[int, ...]]:
        """Return the number of the stay to which a step belongs, and the blocks that are active."""
        stay = step // self.every
        cycle, turn = divmod(stay, self.stays)
        blocks = list(range(self.num_blocks))
        if self.order == "random":
            generator = keyed_generator(torch.device("cpu"), self.seed, cycle)
            # Named, since a plan computes under a default device of its own.
            drawn = torch.randperm(self.num_blocks, generator=generator, device="cpu")
            blocks = drawn.tolist()
        elif self.order == "descending":
            blocks.reverse()
        return stay, tuple(blocks[turn * self.active : (turn + 1) * self.active])


def usual_stay(num_steps: float, stays: int) -> int:
    """Return the length of a stay, in steps, with which a run gives each block its turn.

    BAdam's authors divide the data evenly among the blocks, and take 100 steps at most.

    Args:
        num_steps: The number of steps of the run; infinity if nobody knows it.
        stays: The number of stays in a cycle.
    """
    return int(max(1, min(_LONGEST_STAY, num_steps / stays)))


class BlockTurns:
    """Makes one optimizer train a few blocks of its parameters at a time.

    Parameters of blocks that are not active do not require a gradient. So no gradient of theirs is
    formed or held, autograd stops below the lowest active block, and the optimizer skips them,
    weight decay included. With `drop_state`, each stay starts from an optimizer state of zero, and
    only active blocks have one: block coordinate descent as in BAdam (arXiv:2404.02827, algorithm
    1). Otherwise the state stays where it is, and goes on when the block is active again.

    Call `begin_step` before the first forward pass of each optimizer step, so that all gradients
    of a step, accumulated or not, are those of the same blocks.

    Args:
        optimizer: The optimizer of all parameters, which must step each of them from its gradient
            and state alone.
        blocks: The parameters of each block, keyed by the block's name. Parameters of the optimizer
            that are in no block are trained in every step.
        order: Which blocks are active at which step.
        drop_state: Whether a block's state is deleted at the end of its stay.

    Raises:
        Refusal: If the optimizer needs all of its parameters in a step.
        ValueError: If a parameter of a block is not one of the optimizer's.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        blocks: Mapping[str, Sequence[Tensor]],
        order: BlockOrder,
        *,
        drop_state: bool = True,
    ) -> None:
        kind = unwrapped(type(optimizer))
        facts = Plan(kind.__name__, traits_of(kind), blocks=True, drops_state=drop_state)
        check(facts, parts=["blocks"])
        held = {p for group in optimizer.param_groups for p in group["params"]}
        for name, parameters in blocks.items():
            if not held.issuperset(parameters):
                raise ValueError(f"The optimizer does not hold all parameters of block {name!r}.")
        assert len(blocks) == order.num_blocks
        self.optimizer = optimizer
        self.blocks = blocks
        self.order = order
        self.drop_state = drop_state
        self.active: tuple[str, ...] = ()
        self._stay: int | None = None

    def begin_step(self, step: int) -> bool:
        """Activate the blocks of an optimizer step, and return whether they are others than before.

        Args:
            step: The number of optimizer steps that have been taken.
        """
        stay, numbers = self.order.at(step)
        names = list(self.blocks)
        active = tuple(names[number] for number in numbers)
        is_new = (stay, active) != (self._stay, self.active)
        if is_new and self.drop_state:
            self._drop()
        if self.drop_state:
            begin_stay(self.optimizer, stay)
        self._stay, self.active = stay, active
        for name, parameters in self.blocks.items():
            for parameter in parameters:
                if parameter.requires_grad is not (name in active):
                    parameter.requires_grad_(name in active)
                if name not in active:
                    parameter.grad = None
        return is_new

    def release(self) -> None:
        """Let all parameters require a gradient again."""
        for parameters in self.blocks.values():
            for parameter in parameters:
                parameter.requires_grad_(True)

    def state_dict(self) -> dict[str, Any]:
        """Return which stay the optimizer's state belongs to."""
        return {"stay": self._stay, "active": list(self.active)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a checkpoint: the optimizer's state is that of the saved stay."""
        self._stay, self.active = state_dict["stay"], tuple(state_dict["active"])

    def _drop(self) -> None:
        for parameters in self.blocks.values():
            for parameter in parameters:
                self.optimizer.state.pop(parameter, None)


def largest_blocks(blocks: Mapping[str, Sequence[Tensor]], active: int) -> tuple[str, ...]:
    """Return the names of the `active` blocks that hold the most bytes; the first of equals."""
    size = {name: sum(p.numel() * p.itemsize for p in held) for name, held in blocks.items()}
    largest = set(sorted(size, key=lambda name: -size[name])[:active])
    return tuple(name for name in blocks if name in largest)


@contextmanager
def frozen(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Let no trainable one of `parameters` require a gradient inside the block."""
    thawed = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in thawed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in thawed:
            parameter.requires_grad_(True)
