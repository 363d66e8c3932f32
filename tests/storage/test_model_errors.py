"""Errors of libraries that read a model say which model it is, and what to do."""

from __future__ import annotations

import pytest

from lit_ft.storage.model_errors import model_errors_name


def test_a_missing_package_is_no_damage():
    with (
        pytest.raises(ValueError, match=r"^m needs what .*: FlashAttention2 .* installed\.$"),
        model_errors_name("m"),
    ):
        raise ImportError("FlashAttention2 is on, and flash_attn is not installed.\nRead on at x")


def test_a_librarys_error_names_the_model():
    with pytest.raises(ValueError, match=r"m: .*KeyError.*whole copy"), model_errors_name("m"):
        raise KeyError("x")
