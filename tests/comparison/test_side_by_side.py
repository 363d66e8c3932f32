"""What runs that train at the same time may use."""

from __future__ import annotations

from lit_ft.comparison import side_by_side
from lit_ft.comparison.side_by_side import shares_of


def test_one_run_has_all(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert shares_of(1, gpus=0) == shares_of(1, gpus=4) == [{}]


def test_each_has_a_gpu_of_those_that_may_be_seen(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [one["CUDA_VISIBLE_DEVICES"] for one in shares_of(3, gpus=2)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    assert [one["CUDA_VISIBLE_DEVICES"] for one in shares_of(2, gpus=2)] == ["5", "3"]


def test_without_gpus_each_has_its_part_of_the_cores(monkeypatch):
    monkeypatch.setattr(side_by_side, "usable_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert shares_of(3, gpus=0) == [{"OMP_NUM_THREADS": "2"}] * 3
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the user has chosen
    assert shares_of(2, gpus=0) == [{}, {}]
