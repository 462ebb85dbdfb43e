"""Conditions that hold for every test."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)  # as on the ranks: results are compared bit for bit


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked ``cuda`` on machines without a GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
