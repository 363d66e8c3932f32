"""Tests, a folder for each room of lit_ft; what several of them need is in `support`."""

import pytest

pytest.register_assert_rewrite("tests.support")  # a helper's assert shows both sides too
