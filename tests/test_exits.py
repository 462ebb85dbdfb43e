"""Early exit: who leaves where, how many of them are right, and what that costs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from deepspeed.pipe import LayerSpec
from torch import nn

from ds_al import ALLayerSpec
from ds_al.errors import ALConfigError
from ds_al.exits import averaged_accuracy, check_average, check_threshold, confidence_of, early_exits, leaves_at
from ds_al.experiment.exits import averaged_rows, confidence_rows, draw_exits, exit_rows
from ds_al.models import build_al
from ds_al.models.exit_cost import ExitCost, averaged_exits, exit_costs, fixed_exit, tried_exits

# Three exits, four samples: the first is sure at once, the second at exit 2, the third never, the fourth from 1 on.
CONFIDENCE = torch.tensor([[0.9, 0.4, 0.3, 0.8], [0.5, 0.8, 0.4, 0.9], [0.6, 0.6, 0.5, 0.7]])
CORRECT = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 1], [0, 1, 1, 1]]).bool()
COSTS = [ExitCost(100, 10), ExitCost(200, 20), ExitCost(300, 30)]


def test_a_sample_leaves_at_the_first_exit_that_is_sure_and_at_the_last_at_least() -> None:
    assert leaves_at(CONFIDENCE, 0.8).tolist() == [0, 1, 2, 0]
    assert leaves_at(CONFIDENCE, 1.0).tolist() == [2, 2, 2, 2]
    assert leaves_at(CONFIDENCE, 0.01).tolist() == [0, 0, 0, 0]


def test_accuracy_is_that_of_the_exit_each_sample_left_at() -> None:
    at_once, mixed, full = early_exits(CONFIDENCE, CORRECT, [0.01, 0.8, 1.0])
    assert (at_once.accuracy, mixed.accuracy, full.accuracy) == (0.25, 0.75, 0.75)
    assert (at_once.left, mixed.left, full.left) == ([1, 0, 0], [0.5, 0.25, 0.25], [0, 0, 1])


def test_an_exit_costs_its_layers_and_what_was_looked_at_on_the_way() -> None:
    assert fixed_exit(COSTS) == [110, 320, 630]
    assert tried_exits(COSTS, [0.5, 0.25, 0.25]) == 0.5 * 110 + 0.25 * 330 + 0.25 * 660
    rows = confidence_rows(early_exits(CONFIDENCE, CORRECT, [0.8, 1.0]), COSTS)
    assert [row["cost"] for row in rows] == pytest.approx([302.5 / 630, 660 / 630])
    assert exit_rows([0.5, 0.6, 0.7], COSTS)[1] == {"exit": 2, "accuracy": 0.6, "flops": 320, "cost": 320 / 630}


def test_a_mean_of_exits_costs_the_whole_path_and_the_exits_that_are_looked_at() -> None:
    assert averaged_exits(COSTS) == [630, 650, 660]
    row = {"averaged": 2, "accuracy": 0.8, "flops": 650, "cost": 650 / 630}
    assert averaged_rows([0.7, 0.8, 0.9], COSTS)[1] == row


def test_confidence_is_the_largest_softmax_probability() -> None:
    scores = torch.tensor([[0.0, 0.0], [0.0, 100.0]])
    assert confidence_of(scores).tolist() == [0.5, 1.0]


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.1])
def test_what_is_no_probability_is_refused(threshold: float) -> None:
    with pytest.raises(ALConfigError, match=str(threshold)):
        check_threshold(threshold)


def test_linear_layers_cost_what_is_computed_by_hand() -> None:
    """A product (1 x k) (k x n) is 2 k n; the second exit decodes through both h."""
    linear = [
        ALLayerSpec(f=LayerSpec(nn.Linear, i, 5), b=LayerSpec(nn.Linear, 5, 4), g=LayerSpec(nn.Linear, c, 4),
                    h=LayerSpec(nn.Linear, 4, c))
        for i, c in ((7, 3), (5, 4))
    ]  # fmt: skip
    found = exit_costs(linear, shape=(6, 7), num_classes=3)
    assert found == [ExitCost(2 * 7 * 5, 2 * (5 * 4 + 4 * 3)), ExitCost(2 * 5 * 5, 2 * (5 * 4 + 4 * 4 + 4 * 3))]


@pytest.mark.parametrize("objective", ["contrast", "greedy", "decoded"])
def test_every_network_and_objective_is_counted(objective: str) -> None:
    images = build_al("vgg", preset="small", in_shape=(3, 32, 32), num_classes=10, objective=objective)
    vision = exit_costs(images, shape=(4, 3, 32, 32), num_classes=10)
    texts = build_al("lstm", preset="small", vocab_size=30, num_classes=4, objective=objective, bridge="block")
    text = exit_costs(texts, shape=(4, 9), num_classes=4, dtype=torch.int64)
    for costs in (vision, text):
        assert len(costs) == 4 and all(cost.exit > 0 for cost in costs)
        assert fixed_exit(costs) == sorted(fixed_exit(costs))


def test_the_curve_is_drawn(tmp_path: Path) -> None:
    rows = confidence_rows(early_exits(CONFIDENCE, CORRECT, [0.5, 0.8, 1.0]), COSTS)
    draw_exits(exit_rows([0.5, 0.6, 0.7], COSTS), rows, tmp_path / "early_exit.png")
    assert (tmp_path / "early_exit.png").stat().st_size > 5000


def test_each_number_of_exits_is_averaged_from_the_last_one_on() -> None:
    first = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    last = torch.tensor([[0.3, 0.7], [0.45, 0.55]])
    # Alone the last exit is wrong on the first sample; the first one is so sure there that the mean is right.
    assert averaged_accuracy(torch.stack([first, last]), torch.tensor([0, 1])) == [0.5, 1.0]


@pytest.mark.parametrize("average", [0, 3])
def test_exits_that_are_not_there_are_refused(average: int) -> None:
    with pytest.raises(ALConfigError, match=f"average={average}: expected 1..2"):
        check_average(average, exit=2)
