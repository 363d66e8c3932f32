"""Make the optimizer's moments follow the basis: a change of coordinates for each kind of state."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lit_ft.compat.optimizers import MeanAndSquare, Moment, Square
from lit_ft.tensors.quantized_state import as_float
from lit_ft.tensors.row_blocks import row_blocks, rows_of
from lit_ft.tensors.sharding import local


def change_of_basis(old: Tensor, new: Tensor) -> Tensor:
    """Return the matrix C [r, r] that takes coordinates in the old basis to the new one.

    S_old C is the best fit of S_old P_old in the new basis: C = P_old P_newᵀ (P_new P_newᵀ)⁻¹. The
    last factor is the identity if the new rows are orthonormal.

    Args:
        old: The old basis P_old [r, n].
        new: The new basis P_new [r, n].
    """
    overlap, gram = old @ new.T, new @ new.T
    # `solve` would wait for the device to report success.
    solved: Tensor = torch.linalg.solve_ex(gram, overlap.T).result
    return solved.T


def rotated(mean: Tensor, square: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """Return bias-corrected first and second moments in the new coordinates.

    The first moment m becomes m C. The second moment v becomes |(v − m²) C∘² + (m C)²|, where C∘²
    has the squares of the elements of C. The variance v − m² is transformed as if the coordinates
    were uncorrelated (LDAdam, arXiv:2410.16103, section 3.2). To this, `unseen` adds the second
    moment that is expected outside the old basis.

    Args:
        mean: The bias-corrected first moment m̂ [rows, r].
        square: The bias-corrected second moment v̂ [rows, r].
        rotation: The change of basis C [r, r].
    """
    turned = mean @ rotation
    variance = torch.addcmul(square, mean, mean, value=-1)
    known = turned.square().addmm_(variance, rotation.square()).abs_()
    return turned, known.add_(unseen(square, rotation))


def unseen(square: Tensor, rotation: Tensor) -> Tensor:
    """Return the second moment [..., r] to expect in directions that the old basis did not reach.

    A share 1 − Σᵢ C²ᵢⱼ of new direction j is orthogonal to the old basis. Its second moment is
    assumed to be the mean over the old directions. If it were taken to be zero, AdamW's steps would
    be too large by a factor of 1 / √overlap until v has filled up, which takes hundreds of steps.

    Args:
        square: The second moment v [..., r] in the old basis.
        rotation: The change of basis C [r, r].
    """
    share = (1 - rotation.square().sum(0)).clamp_(min=0)
    return square.mean(-1, keepdim=True) * share


def rotate_moments(
    state: dict[str, Any],
    group: dict[str, Any],
    rotation: Tensor,
    *,
    moments: tuple[Moment, ...],
) -> bool:
    """Transform one parameter's optimizer state to a new basis, in place.

    The rows are independent. If the state is sharded, each rank transforms the rows that it holds.

    Args:
        state: The optimizer's state for the parameter S [rows, r].
        group: The optimizer's parameter group that holds S.
        rotation: The change of basis C [r, r], from `change_of_basis`.
        moments: The rules for the entries of the state, from `Traits.moments`. If several rules
            read the same entry, the first one applies.

    Returns:
        True if every matrix in the state has a rule, or if the state is empty. Otherwise False, and
        the state is unchanged.
    """
    rules, covered = [], set[str]()
    for moment in moments:
        there = all(state.get(key) is not None for key in moment.keys)
        if there and covered.isdisjoint(moment.keys):
            rules.append(moment)
            covered.update(moment.keys)
    if not rules or not _covers(state, covered):
        return not state
    for rule in rules:
        if isinstance(rule, MeanAndSquare):
            _turn_pair(state, rule.mean, rule.square, group["betas"], rotation)
        elif isinstance(rule, Square):
            _write(state, rule.key, _squares(_read(state, rule.key), rotation))
        else:
            _write(state, rule.key, _read(state, rule.key) @ rotation)
    return True


def _covers(state: Mapping[str, Any], covered: Collection[str]) -> bool:
    """Whether there is a rule for every matrix in the state, since all must follow the basis."""
    for key, value in state.items():
        if not isinstance(value, Tensor):
            continue
        if is_traceable_wrapper_subclass(local(value)):
            return False
        # The scale of 8-bit codes follows the codes. Code books and block maxima are 1-D.
        if value.ndim > 1 and key.removesuffix("_scale") not in covered:
            return False
    return True


def _squares(square: Tensor, rotation: Tensor) -> Tensor:
    return square @ rotation.square() + unseen(square, rotation)


def _turn_pair(
    state: dict[str, Any], first: str, second: str, betas: tuple[float, ...], rotation: Tensor
) -> None:
    # A few rows at a time, because it takes six times their memory, and embeddings have many.
    held = {k: local(v) if isinstance(v, Tensor) else v for k, v in state.items()}
    shape = tuple(held[first].shape)
    for rows in row_blocks(held[first], at_most=2**22):
        _turn_rows(rows_of(held, shape, rows), first, second, betas, rotation)


def _turn_rows(
    state: dict[str, Any], first: str, second: str, betas: tuple[float, ...], rotation: Tensor
) -> None:
    mean = _read(state, first)
    # With raw moments, √v̂ would come out too large while t is small: the two corrections differ.
    # A fused optimizer counts steps on the device. The host would wait for a Python number.
    steps = torch.as_tensor(state["step"], dtype=mean.dtype)
    correct_mean, correct_square = 1 - betas[0] ** steps, 1 - betas[1] ** steps
    mean = mean / correct_mean
    square = _read(state, second) / correct_square
    mean, square = rotated(mean, square, rotation)
    _write(state, first, mean * correct_mean)
    _write(state, second, square * correct_square)


def _read(state: dict[str, Any], name: str) -> Tensor:
    if f"{name}_scale" in state:
        return as_float(name, state).dequantize()
    value = local(state[name])
    if value.dtype is not torch.uint8:
        return value
    from bitsandbytes.functional import dequantize_blockwise

    number = name.removeprefix("state")
    dequantised = dequantize_blockwise(
        value, absmax=state[f"absmax{number}"], code=state[f"qmap{number}"], blocksize=256
    )
    return dequantised.view_as(value)


def _write(state: dict[str, Any], name: str, new: Tensor) -> None:
    value = as_float(name, state)
    if value.dtype is not torch.uint8:
        value.copy_(new)
        return
    from bitsandbytes.functional import quantize_blockwise

    number = name.removeprefix("state")
    quantised, quantisation = quantize_blockwise(
        new.contiguous(), code=state[f"qmap{number}"], blocksize=256
    )
    value.copy_(quantised.view_as(value))
    state[f"absmax{number}"].copy_(quantisation.absmax)
