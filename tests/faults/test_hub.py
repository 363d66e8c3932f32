"""Without a way to the hub, a name of it fails at once, and what the cache holds is loaded."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from lit_ft.data.sources import open_source
from lit_ft.models import Pretrained
from lit_ft.storage.hub import offline_if_unreachable, why_unreachable


@pytest.fixture(params=["offline", "refused", "no such host"])
def unreachable(request, monkeypatch, tmp_path) -> str:
    """Why the hub is unreachable; its cache is empty."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
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


def test_a_hub_behind_a_proxy_is_reached(unreachable, monkeypatch):
    if unreachable == "HF_HUB_OFFLINE is set":
        pytest.skip("the user has said so")
    monkeypatch.setattr(constants, "ENDPOINT", "http://nowhere.invalid/a")
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        assert why_unreachable() is None
        with offline_if_unreachable():
            assert not constants.HF_HUB_OFFLINE


def test_a_folder_needs_no_hub(unreachable, tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    Pretrained(str(tmp_path)).check()
