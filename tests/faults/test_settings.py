"""Generated configurations: what is admitted is sound, and what is refused is named."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from tests.support.settings import agrees, configurations, run


@given(configurations())
@settings(max_examples=100, derandomize=True, deadline=None)
def test_a_configuration_is_admitted_if_and_only_if_it_is_sound(drawn):
    agrees(drawn)


@pytest.mark.slow
@given(configurations())
@settings(max_examples=3000, suppress_health_check=list(HealthCheck))
def test_three_thousand_configurations_are_admitted_if_and_only_if_they_are_sound(drawn):
    agrees(drawn)


@pytest.mark.slow
@given(drawn=configurations(sound=True))
@settings(max_examples=12, derandomize=True, suppress_health_check=list(HealthCheck))
def test_what_is_admitted_trains_or_is_told_what_does_not_go_together(
    drawn, library, tmp_path_factory
):
    assert run(drawn, tmp_path_factory.mktemp("run")) in ("completed", "refused")
