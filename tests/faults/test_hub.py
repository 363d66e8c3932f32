"""Without a way to the hub, a name of it fails at once, and what the cache holds is loaded."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from huggingface_hub import constants

from lit_ft.data.sources import open_source
from lit_ft.models import Pretrained
from lit_ft.storage import hub
from lit_ft.storage.hub import offline_if_unreachable, why_unreachable


@pytest.fixture(params=["offline", "refused", "no such host"])
def unreachable(request, monkeypatch, tmp_path) -> str:
    """Why the hub is unreachable; its cache is empty."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(hub, "_known", {})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", request.param == "offline")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    host = "nowhere.invalid" if request.param == "no such host" else f"127.0.0.1:{port}"
    monkeypatch.setattr(constants, "ENDPOINT", f"http://{host}")
    return "HF_HUB_OFFLINE is set" if request.param == "offline" else "no connection to "


@pytest.fixture
def within_3_seconds() -> Iterator[None]:
    import datasets  # noqa: F401  # which takes longer

    began = time.monotonic()
    yield
    assert time.monotonic() - began < 3


def test_a_model_is_named(unreachable, within_3_seconds):
    with pytest.raises(ValueError, match=rf"=someone/model: .*reached \({unreachable}"):
        Pretrained("someone/model").check()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_is_named(unreachable, streaming, within_3_seconds):
    with pytest.raises(ValueError, match=rf"^someone/data: .*reached \({unreachable}"):
        list(open_source("someone/data", streaming=streaming).rows())


def test_a_model_in_the_cache_is_loaded_at_once(unreachable, tmp_path):
    repository = tmp_path / "hub" / "models--someone--model"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("1" * 40)
    folder = repository / "snapshots" / ("1" * 40)
    folder.mkdir(parents=True)
    config = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 16}
    config |= {"num_attention_heads": 1, "intermediate_size": 8}
    (folder / "config.json").write_text(json.dumps(config))
    Pretrained(str(folder)).build_empty()  # imports the model
    began = time.monotonic()
    source = Pretrained("someone/model")
    source.check()
    assert source.build_empty().config.hidden_size == 8
    assert time.monotonic() - began < 3
    assert (unreachable == "HF_HUB_OFFLINE is set") == constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("variable", ["http_proxy", "ALL_PROXY"])
def test_a_hub_behind_a_proxy_is_reached(unreachable, monkeypatch, variable):
    if unreachable == "HF_HUB_OFFLINE is set":
        pytest.skip("the user has said so")
    monkeypatch.setattr(constants, "ENDPOINT", "http://nowhere.invalid/a")
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        assert why_unreachable() is None
        with offline_if_unreachable():
            assert not constants.HF_HUB_OFFLINE


@pytest.fixture
def address(monkeypatch, tmp_path) -> tuple[str, int]:
    """Where the hub is; nobody listens there yet."""
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(hub, "_known", {})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        return closed.getsockname()


@contextmanager
def too_busy_to_answer(address: tuple[str, int]) -> Iterator[socket.socket]:
    """A host that drops whoever connects, until its queue is accepted."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.create_server(address, backlog=0))
        for _ in range(3):
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(address)
        yield server


def test_who_connects_and_tries_again_is_not_told_the_old_failure(address):
    """In a notebook, the process stays."""
    assert "no connection to 127.0.0.1: " in why_unreachable()
    with socket.create_server(address):
        assert why_unreachable() is None


def test_a_slow_connection_is_one(address):
    """The first attempts are dropped, and the system repeats them after 1 and 3 seconds."""
    with too_busy_to_answer(address) as server:

        def accept() -> None:
            time.sleep(2.1)
            for _ in range(3):
                server.accept()[0].close()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        began = time.monotonic()
        assert why_unreachable() is None
        assert time.monotonic() - began > 2


def test_a_host_that_never_answers_is_waited_for_once(address, monkeypatch):
    monkeypatch.setattr(hub, "_SECONDS", 0.5)
    monkeypatch.setattr(hub, "_FAST", 0.2)
    with too_busy_to_answer(address):
        began = time.monotonic()
        for _ in range(5):
            assert why_unreachable() == "no connection to 127.0.0.1: no answer within 0.5 seconds"
        assert time.monotonic() - began < 1.5


def test_a_folder_needs_no_hub(unreachable, tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    Pretrained(str(tmp_path)).check()
