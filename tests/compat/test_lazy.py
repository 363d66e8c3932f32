"""Packages import their names on demand: every public name is there, and no other."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

import lit_ft


@pytest.mark.parametrize("package", ["lit_ft", "lit_ft.loss", "lit_ft.models"])
def test_each_public_name_is_there_and_no_other(package: str) -> None:
    module = import_module(package)
    assert all(getattr(module, name) is not None for name in module.__all__)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'missing'"):
        module.missing  # noqa: B018


def test_looking_at_data_waits_for_no_library_of_training() -> None:
    heavy = "lightning", "peft", "torch.distributed.fsdp", "bitsandbytes", "torchao"
    code = f"import sys, lit_ft.preview; print([n for n in {heavy} if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    assert lit_ft.__all__


def test_a_comparison_loads_no_library_of_training_and_what_draws_only_to_draw() -> None:
    heavy = "torch", "lightning", "transformers", "altair", "vl_convert"
    code = f"import sys, lit_ft.compare; print([n for n in {heavy} if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
