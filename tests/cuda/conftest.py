"""What tests on a GPU share."""

from __future__ import annotations

import pytest


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Where the ranks of the test compute; ``cpu`` by ``--device cpu``, which tries the tests themselves."""
    return request.config.option.device
