"""Step large parameters while backward runs, and free each gradient as soon as it is used."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lit_ft.compat.not_finite import of_gradients
from lit_ft.compat.optimizers import traits_of, unwrapped
from lit_ft.compat.plan import Plan
from lit_ft.compat.rules import check
from lit_ft.optim.narrowed import narrowed
from lit_ft.optim.row_chunked import without_hooks
from lit_ft.tensors.finite import values
from lit_ft.tensors.sharding import added_over_ranks, is_sharded

_PART_BYTES = 2**26  # of gradients that are stepped at a time after backward


class LayerwiseStep:
    """Makes `optimizer.step(closure)` step `parameters` inside the closure's backward pass.

    There is only one optimizer. As soon as the gradient of one of these parameters is complete, the
    optimizer is narrowed to that parameter and steps it, and the gradient is freed. All other
    parameters are stepped after backward, in the rest of `optimizer.step`. Step hooks and step
    counters run once per step, as usual. The result equals the ordinary step bit for bit. LOMO
    (arXiv:2306.09782) does this for SGD.

    If gradients accumulate over several backward passes, they are kept until the last pass, and the
    optimizer takes its ordinary step. A step without a closure is an ordinary step too.

    A gradient that is not finite moves nothing: it and all that follow in the same backward pass
    are replaced by zeros, and the step stops when the pass is over. Until then, the host does not
    wait for the device, and no rank leaves the others. What came before has been stepped.

    With `max_norm`, call `backward(loss)` in place of `loss.backward()`. The norm over all
    parameters must be known before the first one moves, so backward runs twice over the same graph.
    The first pass only computes the norm.

    Args:
        optimizer: The optimizer, which must step each parameter from its gradient and state alone.
        parameters: The parameters to step during backward, usually the large ones. The optimizer's
            other parameters are stepped after backward.
        max_norm: The largest norm of the gradient of all the optimizer's parameters together; None
            does not clip by norm.
        max_value: The largest absolute value of any gradient element of the parameters stepped
            during backward; None does not clip by value. With `max_norm` it applies to all
            parameters.
        in_parts: The parameters that are stepped a few at a time even where that is after backward,
            so that what a step needs exists for a few of them at a time.
        companions: For a parameter that must not be stepped before other leaves of the same layer
            have their gradients: these leaves. It waits for those that require a gradient.
        around: A function that returns a context manager for a step of one or a few parameters,
            given the optimizer, which is narrowed to them; None for none.
        groups: Parameters that wait until all of their group have their gradients, such as those of
            one block. What backward keeps of the block is freed by then, so that it does not add to
            the memory that a step needs.

    Raises:
        Refusal: If the optimizer needs more than one parameter at a time.
        RuntimeError: While stepping, if the optimizer counts steps in its groups, or if a parameter
            receives its gradient in several parts.
        NotFinite: While stepping, if a gradient is not finite or, with `max_norm`, if the norm is
            not. In the second case no parameter has moved.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Iterable[Tensor],
        *,
        max_norm: float | None = None,
        max_value: float | None = None,
        in_parts: Iterable[Tensor] = (),
        companions: Mapping[Tensor, Sequence[Tensor]] | None = None,
        around: Callable[[Optimizer], AbstractContextManager[Any]] | None = None,
        groups: Iterable[Sequence[Tensor]] = (),
    ) -> None:
        kind = unwrapped(type(optimizer))
        check(Plan(kind.__name__, traits_of(kind), layerwise=True), parts=["layerwise"])
        self.optimizer = optimizer
        self.max_norm = max_norm
        self.max_value = max_value
        self.grad_norm: Tensor | None = None
        self._large = [p for p in parameters if p.requires_grad]
        self._in_parts = list(in_parts)
        self._companions = companions or {}
        self._belongs_to = {one: p for p, them in self._companions.items() for one in them}
        self._missing: dict[Tensor, set[Tensor]] = {}  # the leaves that a parameter waits for
        self._group_of = {p: group for group in groups for p in group}
        self._ready: set[Tensor] = set()  # they wait for nothing but the rest of their group
        self._around = around or (lambda _: nullcontext())
        self._step_without_hooks = without_hooks(type(optimizer).step)
        self._steps_now = False
        self.steps = 0  # optimizer steps so far, for messages
        self._stepped: set[Tensor] = set()
        self._extremes: dict[Tensor, Tensor] = {}  # a scalar each, finite if the gradient is
        self._so_far: Tensor | None = None  # their sum
        self._norms: dict[Tensor, Tensor] | None = None
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._arm),
            optimizer.register_step_post_hook(self._free),
            *(p.register_post_accumulate_grad_hook(self._on_gradient) for p in self._large),  # type: ignore[no-untyped-call]
        ]

    @property
    def clips_now(self) -> bool:
        """Whether a closure is running that steps parameters during backward and clips by norm."""
        return self._steps_now and self.max_norm is not None

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Back-propagate the scalar `loss`, in two passes if `clips_now`.

        The first pass sets `grad_norm`, the norm before clipping. After the second pass, the
        gradients of the parameters that are stepped after backward are clipped too.
        """
        held = [p for g in self.optimizer.param_groups for p in g["params"] if p.requires_grad]
        if any(p.grad is not None for p in held):  # from an earlier pass of the same step
            self._steps_now = False
        if not self.clips_now:
            loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]
            return
        self._norms = {}
        try:
            # Only for the parameters: other leaves (GaLore's sketches) must not add up twice.
            norm_alone = {"retain_graph": True, "inputs": held}
            loss.backward(*args, **{**kwargs, **norm_alone})  # type: ignore[no-untyped-call]
            for parameter in held:
                if parameter.grad is not None:
                    self._norms[parameter] = get_total_norm(parameter.grad)
                    parameter.grad = None
            norms, total = self._norms, [self._norms[p] for p in held if p in self._norms]
            self.grad_norm = get_total_norm(total)
        finally:
            self._norms = None
        if not self.grad_norm.isfinite():
            raise of_gradients(self._not_finite(norms), self.steps)
        loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._clip(held)

    def remove(self) -> None:
        """Remove all hooks from the optimizer and its parameters."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _arm(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Wrap the closure, which runs a step's last backward pass, so that it steps parameters."""

        def armed(closure: Callable[[], Any] | None) -> Callable[[], Any] | None:
            if closure is None:
                return None

            def run() -> Any:
                # A gradient that exists already is from an earlier pass. Then all must be kept.
                self._steps_now = all(p.grad is None for p in self._large)
                self._stepped.clear()
                self._extremes.clear()
                self._missing.clear()
                self._ready.clear()
                self._so_far = self.grad_norm = None
                self._watch_companions()
                try:
                    result = closure()
                finally:
                    self._steps_now = False
                self._stop_if_not_finite()
                self._step_in_parts()
                return result

            return run

        closures = [*args[1:], *kwargs.values()]
        if all(closure is None for closure in closures):
            self._step_in_parts()
        return (args[0], *map(armed, args[1:])), {k: armed(v) for k, v in kwargs.items()}

    def _free(self, optimizer: Optimizer, *_: Any) -> None:
        # The other gradients stay: GaLore still reads them after the step.
        for parameter in self._large:
            parameter.grad = None
        self.steps += 1

    def _on_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        if self._norms is not None:
            self._note_once(parameter, self._norms)
            self._norms[parameter] = get_total_norm(parameter.grad)
            parameter.grad = None
        elif self._steps_now:
            self._note_once(parameter, self._stepped)
            self._stepped.add(parameter)
            if self.grad_norm is None:  # else it has been looked at
                self._keep_finite(parameter)
            self._clip([parameter])
            companions = self._companions.get(parameter, ())
            waits_for = {one for one in companions if one.requires_grad and one.grad is None}
            if waits_for:
                self._missing[parameter] = waits_for
            else:
                self._step_group_of(parameter)

    def _watch_companions(self) -> None:
        """Add a hook to each companion that requires a gradient for the first time."""
        for one in [one for one in self._belongs_to if one.requires_grad]:
            parameter = self._belongs_to.pop(one)

            def on_gradient(companion: Tensor, parameter: Tensor = parameter) -> None:
                missing = self._missing.get(parameter)
                if self._steps_now and missing is not None:
                    missing.discard(companion)
                    if not missing:
                        self._step_group_of(parameter)

            self._handles.append(one.register_post_accumulate_grad_hook(on_gradient))  # type: ignore[no-untyped-call]

    def _step_group_of(self, parameter: Tensor) -> None:
        """Step the group of a parameter that waits for nothing else, if it is the last of it.

        Of a group that does not become complete, all are stepped after backward.
        """
        self._missing.pop(parameter, None)
        self._ready.add(parameter)
        group = self._group_of.get(parameter, [parameter])
        if self._ready.issuperset(group):
            for one in group:
                self._step_with_companions(one)

    def _step_with_companions(self, parameter: Tensor) -> None:
        for one in self._companions.get(parameter, ()):
            if one.grad is not None and self._so_far is not None:
                one.grad.masked_fill_(~self._so_far.isfinite(), 0)
        self._step(parameter)

    def _step_in_parts(self) -> None:
        part: list[Tensor] = []
        for parameter in self._in_parts:
            if parameter.grad is not None:
                part.append(parameter)
            if sum(p.grad.nbytes for p in part if p.grad is not None) >= _PART_BYTES:
                self._step(*part)
                part.clear()
        if part:
            self._step(*part)

    def _keep_finite(self, parameter: Tensor) -> None:
        """Replace the gradient by zeros if it or an earlier one of this pass is not finite."""
        assert parameter.grad is not None
        if parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
        gradient = values(parameter.grad)
        lowest, highest = gradient.aminmax() if gradient.numel() else gradient.new_zeros(2)
        self._extremes[parameter] = lowest + highest
        self._so_far = lowest + highest if self._so_far is None else self._so_far + lowest + highest
        gradient.masked_fill_(~self._so_far.isfinite(), 0)

    def _stop_if_not_finite(self) -> None:
        if self._so_far is None:
            return
        sharded = next(filter(is_sharded, self._extremes), self._so_far)
        [on_all_ranks] = added_over_ranks([self._so_far.reshape(1)], [sharded])
        if not on_all_ranks.isfinite():
            raise of_gradients(self._not_finite(self._extremes), self.steps)

    def _not_finite(self, scalars: Mapping[Tensor, Tensor]) -> list[str]:
        """Return the names of the parameters whose scalar is not finite on some rank, in order."""
        sums = added_over_ranks([scalar.reshape(1) for scalar in scalars.values()], [*scalars])
        bad = {p for p, total in zip(scalars, sums, strict=True) if not total.isfinite()}
        return [name for p, name in _names(self.optimizer).items() if p in bad]

    def _clip(self, parameters: list[Tensor]) -> None:
        if self.grad_norm is not None and self.max_norm is not None:
            clip_grads_with_norm_(parameters, self.max_norm, self.grad_norm)
        if self.max_value is not None:
            clip_grad_value_(parameters, self.max_value)

    def _step(self, *parameters: Tensor) -> None:
        before = _numbers(self.optimizer)
        with narrowed(self.optimizer, *parameters), self._around(self.optimizer):
            self._step_without_hooks(self.optimizer)
        for group, numbers in zip(self.optimizer.param_groups, before, strict=True):
            for key, value in numbers.items():
                if group[key] != value:
                    raise RuntimeError(
                        f"{type(self.optimizer).__name__} counts in its groups ('{key}'), once for "
                        "each parameter that is stepped by itself: step it after backward, without "
                        "layerwise updates."
                    )
        for parameter in parameters:
            parameter.grad = None

    def _note_once(self, parameter: Tensor, seen: Container[Tensor]) -> None:
        if parameter in seen:
            raise RuntimeError(
                f"The gradient of a parameter {tuple(parameter.shape)} comes in parts, and the "
                "first has been used: run one backward pass a step, checkpoint with "
                "use_reentrant=False, or step after backward, without layerwise updates."
            )


def large_parameters(optimizer: Optimizer, min_grad_bytes: int) -> list[Tensor]:
    """Return the trainable parameters whose gradient takes at least `min_grad_bytes` bytes."""
    held = (p for group in optimizer.param_groups for p in group["params"])
    return [p for p in held if p.requires_grad and p.numel() * p.itemsize >= min_grad_bytes]


def _names(optimizer: Optimizer) -> dict[Tensor, str]:
    """Return the name of each parameter, or its shape if the optimizer was given no names."""
    names: dict[Tensor, str] = {}
    for group in optimizer.param_groups:
        shapes = [f"a parameter {tuple(p.shape)}" for p in group["params"]]
        names |= zip(group["params"], group.get("param_names", shapes), strict=True)
    return names


def _numbers(optimizer: Optimizer) -> list[dict[str, float]]:
    return [
        {key: value for key, value in group.items() if isinstance(value, int | float)}
        for group in optimizer.param_groups
    ]
