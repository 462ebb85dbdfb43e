"""Every channel of a stage has the depths that the config asks for, and a group of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ds_al.config.associated_learning import ALConfig
from ds_al.parallel.topology import StageTopology
from ds_al.transport import neighbours
from ds_al.transport.neighbours import Links

STAGES = 4


class Channel:
    def __init__(self, group: tuple[str, int], **options: object) -> None:
        self.group, self.options = group, options


def links_of(stage: int, made: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> Links:
    """The links of one stage of the second replica, whose stage i is rank 10 + i; ``made`` gets the pairs in order."""

    def pair(name: str, peer: int, *, device: torch.device) -> tuple[str, int]:
        made.append((name, peer))
        return name, peer

    monkeypatch.setattr(neighbours, "Sender", Channel)
    monkeypatch.setattr(neighbours, "Receiver", Channel)
    monkeypatch.setattr(neighbours, "pair", pair)
    topology = StageTopology(
        rank=10 + stage, stage=stage, stages=STAGES, replica=1, replicas=2,
        pipeline=tuple(range(10, 10 + STAGES)), same_stage=(stage, 10 + stage),
    )  # fmt: skip
    config = ALConfig(queue_depth=5, receive_slots=7)
    return Links(topology, config=config, device=torch.device("cpu"), dynamic=False, decoders=True)


def test_evaluation_and_decoder_copies_have_the_depths_of_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both once had a queue of 2 and two slots, whatever the config said."""
    links: Any = links_of(1, [], monkeypatch)
    for kind in ("training", "decoders", "evaluation"):
        sender, receiver = getattr(links, kind)
        assert (sender.group, sender.options["queue_depth"]) == ((kind, 12), 5)
        assert (receiver.group, receiver.options["slots"]) == ((kind, 10), 7)
        assert sender.options["dynamic"] == (kind == "evaluation")


def test_no_stage_waits_for_a_border_that_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A border is made when both ends are at it: the stages meet in two steps per kind, and none is left over."""
    orders: list[list[tuple[str, int]]] = [[] for _ in range(STAGES)]
    for stage, made in enumerate(orders):
        links_of(stage, made, monkeypatch)
    steps = 0
    while any(orders):
        wanted = [(*order[0], 10 + stage) if order else None for stage, order in enumerate(orders)]
        met = [stage for stage, want in enumerate(wanted) if want and (want[0], want[2], want[1]) in wanted]
        assert met, orders
        for stage in met:
            orders[stage].pop(0)
        steps += 1
    assert steps == 2 * 3
