"""A card is found by any way in which people and torch write its name, or its size."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_ft.measure.cards import CARDS, card

cards = st.sampled_from(CARDS)
sizes = st.integers(1, 300)


@given(cards, st.sampled_from([str, str.lower, str.upper, lambda name: name.replace(" ", "")]))
def test_every_name_is_found(known, written):
    assert card(written(known.name)) is known


@given(cards, st.sampled_from(["NVIDIA ", "NVIDIA GeForce ", "Tesla ", " "]))
def test_every_name_is_found_after_the_makers(known, maker):
    assert card(maker + known.name) is known


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("4090", "RTX 4090"),
        ("rtx 4090 24GB", "RTX 4090"),
        ("RTX 3060 12GB", "RTX 3060"),
        ("a6000", "RTX A6000"),
        ("pro 6000", "RTX PRO 6000 Blackwell"),
        ("h100", "H100"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("h200-141gb", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("Tesla V100-SXM2-32GB", "V100 32GB"),
        ("NVIDIA GH200 480GB", "GH200"),
    ],
)
def test_what_people_type_and_torch_reports_is_found(text, name):
    assert card(text).name == name


@given(sizes, st.sampled_from(["", "g", "GB", "GiB", "gb", " GB", " gib "]))
def test_a_size_is_a_card_without_a_name(size, unit):
    found = card(f"{size}{unit}")
    assert (found.name, found.memory_bytes) == (None, size << 30)
    assert found.flops is found.bandwidth is None


@given(st.floats(1.0, 1024.0).map(lambda size: round(size, 2)))
def test_a_size_may_have_decimals(size):
    assert card(f"{size:.2f}GB").memory_bytes == int(float(f"{size:.2f}") * 2**30)


@pytest.mark.parametrize(
    "text",
    ["", " ", "0", "0GB", "0.5GB", "-3", "-24GB", "24TB", "24MB", "1025GB", "301", "1e3GB", "nan"]
    + ["inf", "GB", "rtx", "NVIDIA", "²4GB", "4090 16GB", "3060 8GB", "24,5GB", "9" * 5000],
)
def test_what_no_card_has_is_refused(text):
    with pytest.raises(ValueError, match=r"no such card.*A size works too, such as 24GB\.$"):
        card(text)


@given(st.text())
def test_any_text_is_a_card_or_refused_in_a_line(text):
    try:
        found = card(text)
    except ValueError as error:
        assert "no such card" in str(error)
        assert len(str(error).splitlines()) == 1
    else:
        assert found.memory_bytes > 0


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("409", "RTX 4090"),
        ("rtx 4909", "RTX 4090"),
        ("a100", "A100 40GB or A100 80GB"),
        ("V100", "V100 16GB or V100 32GB"),
        ("h10", "H100"),
    ],
)
def test_the_nearest_names_are_given(text, near):
    with pytest.raises(ValueError, match=f"^{text}: no such card. Did you mean .*{near}"):
        card(text)


def test_the_table_is_of_real_cards():
    assert len({known.name for known in CARDS}) == len(CARDS)
    without = {known.name for known in CARDS if not known.has_bfloat16}
    assert without == {"RTX 2060", "RTX 2080 Ti", "T4", "V100 16GB", "V100 32GB"}
    for known in CARDS:  # in the units that the docstring says, which slip by factors of a thousand
        assert 5 << 30 < known.memory_bytes < 200 << 30
        assert 2e13 < known.flops < 3e15
        assert 2e11 < known.bandwidth < 1e13
