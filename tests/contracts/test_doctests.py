"""Examples in docstrings: each public callback has one, and all of them run."""

import doctest
import inspect
import pkgutil
from importlib import import_module

import pytest
from lightning.pytorch import Callback

from lit_ft import callbacks

MODULES = sorted(
    found.name for found in pkgutil.walk_packages(callbacks.__path__, "lit_ft.callbacks.")
)
PUBLIC = [
    value
    for value in (getattr(callbacks, name) for name in callbacks.__all__)
    if inspect.isclass(value) and issubclass(value, Callback)
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORCE_COLOR", raising=False)  # rich would colour the tables
    assert doctest.testmod(import_module(name)).failed == 0  # it prints what differs
    assert not list(tmp_path.iterdir()), "an example leaves no file"


@pytest.mark.parametrize("callback", PUBLIC, ids=lambda callback: callback.__name__)
def test_a_public_callback_has_an_example_that_runs(callback):
    assert callback.__module__ in MODULES
    own = doctest.DocTestParser().get_examples(callback.__doc__ or "")
    assert any(f"{callback.__name__}(" in example.source for example in own)
