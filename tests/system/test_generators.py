"""The user's generators: set aside while layers draw, and as cheap as can be where layers draw from torch's alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from ds_al.system.generators import Generators


def draw() -> tuple[float, float, float]:
    return torch.rand(()).item(), random.random(), float(np.random.rand())


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def test_the_user_draws_as_if_no_layer_drew() -> None:
    seed(3)
    expected = [draw() for _ in range(4)]
    seed(3)
    found, generators = [draw()], Generators()
    with generators.aside():
        torch.manual_seed(0)
        generators.seed_host()
        draw()
        with generators.restored():
            found.append(draw())
        generators.seed_host()
        with generators.aside():
            torch.manual_seed(1)
        with generators.restored():
            found.append(draw())
    found.append(draw())
    assert found == expected


def test_an_error_leaves_the_generators_as_they_were() -> None:
    seed(3)
    expected = draw()
    seed(3)
    with pytest.raises(KeyError), Generators().aside():
        torch.manual_seed(0)
        raise KeyError
    assert draw() == expected


@pytest.mark.parametrize("library", ["none", "python", "numpy"])
def test_the_first_passes_tell_whether_layers_draw_on_the_host(library: str) -> None:
    """Evaluation between them, and draws of the user's, do not count."""
    generators = Generators()
    layer = {"none": lambda: torch.rand(()), "python": random.random, "numpy": np.random.rand}[library]
    drawn = []
    for _ in range(30):
        with generators.aside():
            torch.manual_seed(5)
            generators.seed_host()
            with generators.restored():
                draw()
            torch.manual_seed(5)
            generators.seed_host()
            drawn.append(layer())
            generators.after_pass()
        draw()
    kept = random.getstate()
    with generators.aside():
        torch.manual_seed(6)
        generators.seed_host()
        seeded = random.getstate() != kept
    assert seeded == (library != "none")
    assert library == "none" or len(set(drawn)) == 1, "the draws of a layer follow its seed"
