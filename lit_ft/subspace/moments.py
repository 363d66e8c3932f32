"""The optimizer's moments follow the basis: a change of coordinates for each kind of state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lit_ft.tensors.quantized_state import as_float
from lit_ft.tensors.row_blocks import row_blocks, rows_of
from lit_ft.tensors.sharding import local


def change_of_basis(old: Tensor, new: Tensor) -> Tensor:
    """Return C [r, r] with S_new ≈ S_old C: the best fit of S_old P_old in the new basis.

    C = P_old P_newᵀ (P_new P_newᵀ)⁻¹; the last factor is 1 where the new rows are orthonormal.

    Args:
        old: P_old [r, n].
        new: P_new [r, n].
    """
    overlap, gram = old @ new.T, new @ new.T
    # Not `solve`: it waits for the device to say that it went well.
    solved: Tensor = torch.linalg.solve_ex(gram, overlap.T).result
    return solved.T


def rotated(mean: Tensor, square: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor]:
    """Return bias-corrected first and second moments in the new coordinates.

    m C for the mean; for the square the variance, taken as uncorrelated, goes through C∘² and the
    mean's square through C: |(v − m²) C∘² + (m C)²|. LDAdam, arXiv:2410.16103, section 3.2.
    To this comes what v expects of `unseen` directions.

    Args:
        mean: m̂ [rows, r].
        square: v̂ [rows, r].
        rotation: C [r, r].
    """
    turned = mean @ rotation
    variance = torch.addcmul(square, mean, mean, value=-1)
    known = turned.square().addmm_(variance, rotation.square()).abs_()
    return turned, known.add_(unseen(square, rotation))


def unseen(square: Tensor, rotation: Tensor) -> Tensor:
    """Return the second moment that is to be expected where the old basis did not reach.

    Of new direction j a share 1 − Σᵢ C²ᵢⱼ is orthogonal to the old basis. The gradient there is
    no smaller for not having been looked at; at zero, AdamW's steps would be too large by the
    square root of the overlap until v has filled up, in hundreds of steps. It is taken to be as
    large as in the old directions on average.

    Args:
        square: v [..., r] in the old basis.
        rotation: C [r, r].
    """
    share = (1 - rotation.square().sum(0)).clamp_(min=0)
    return square.mean(-1, keepdim=True) * share


def rotate_moments(
    state: dict[str, Any], group: dict[str, Any], rotation: Tensor, *, name: str = ""
) -> bool:
    """Turn one parameter's optimizer state in place by `rotation` C [r, r].

    Each row turns by itself, so of sharded state each rank turns what it holds.

    Knows torch's AdamW, SGD and Muon momentum, transformers' Adafactor, lit_ft's 8-bit AdamW, and
    bitsandbytes' optimizers of one state and its AdamW, in 8 bits or not.

    Args:
        state: Of the parameter S [rows, r].
        group: That the parameter is in.
        rotation: C.
        name: Of bitsandbytes' optimizers their `optimizer_name`: what `state1` is hangs on it.

    Returns:
        Whether there is a rule for this state, which is left as it is if not; an empty one needs
        none.
    """
    tensors = [local(value) for value in state.values() if isinstance(value, Tensor)]
    has_maxima = bool({"max_exp_avg_sq", "exp_inf"} & state.keys())
    holds_two_means = name == "ademamix"  # in one tensor
    if has_maxima or holds_two_means or any(map(is_traceable_wrapper_subclass, tensors)):
        return False
    if "exp_avg" in state and "exp_avg_sq" in state:
        _turn_pair(state, "exp_avg", "exp_avg_sq", group["betas"], rotation)
        return True
    if "exp_avg_sq_col" in state:  # row sums [rows] stay, column sums [r] turn like squares
        _write(state, "exp_avg_sq_col", _squares(_read(state, "exp_avg_sq_col"), rotation))
        if "exp_avg" in state:
            _write(state, "exp_avg", _read(state, "exp_avg") @ rotation)
        return True
    if "state1" in state and state.get("state2") is not None:
        _turn_pair(state, "state1", "state2", group["betas"], rotation)
        return True
    if "state1" in state and name in ("rmsprop", "adagrad"):  # of squares
        _write(state, "state1", _squares(_read(state, "state1"), rotation))
        return True
    if {"square_avg", "grad_avg"} & state.keys():  # RMSprop's, which may have a momentum beside
        return False
    for key in ("state1", "momentum_buffer", "exp_avg"):
        if state.get(key) is not None:
            _write(state, key, _read(state, key) @ rotation)
            return True
    return not state


def _squares(square: Tensor, rotation: Tensor) -> Tensor:
    return square @ rotation.square() + unseen(square, rotation)


def _turn_pair(
    state: dict[str, Any], first: str, second: str, betas: tuple[float, ...], rotation: Tensor
) -> None:
    # A few rows at a time: the moments of an embedding are the largest tensors that turn.
    held = {k: local(v) if isinstance(v, Tensor) else v for k, v in state.items()}
    shape = tuple(held[first].shape)
    for rows in row_blocks(held[first]):
        _turn_rows(rows_of(held, shape, rows), first, second, betas, rotation)


def _turn_rows(
    state: dict[str, Any], first: str, second: str, betas: tuple[float, ...], rotation: Tensor
) -> None:
    mean = _read(state, first)
    # In raw moments √v̂ would come out too large while t is small: the two corrections differ.
    # A fused optimizer counts on the device: not a Python number, which the host would wait for.
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
