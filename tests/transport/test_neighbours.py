"""Every channel of a stage has the depths that the config asks for."""

from __future__ import annotations

import pytest
import torch

from ds_al.config.associated_learning import ALConfig
from ds_al.parallel.topology import StageTopology
from ds_al.transport import neighbours
from ds_al.transport.neighbours import Links


class Channel:
    def __init__(self, peer: int, **options: object) -> None:
        self.peer, self.options = peer, options


def test_evaluation_and_decoder_copies_have_the_depths_of_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both once had a queue of 2 and two slots, whatever the config said."""
    monkeypatch.setattr(neighbours, "Sender", Channel)
    monkeypatch.setattr(neighbours, "Receiver", Channel)
    monkeypatch.setattr(StageTopology, "new_pipeline_group", lambda self: "own group")
    topology = StageTopology(
        rank=1, stage=1, stages=3, replica=0, replicas=1, pipeline=(0, 1, 2), same_stage=(1,)
    )  # fmt: skip
    config = ALConfig(queue_depth=5, receive_slots=7)
    links = Links(topology, config=config, device=torch.device("cpu"), dynamic=False, decoders=True)
    for sender, receiver in (links.training, links.decoders, links.evaluation):
        assert (sender.peer, sender.options["queue_depth"]) == (2, 5)
        assert (receiver.peer, receiver.options["slots"]) == (0, 7)
    assert [each.sender.options["group"] for each in (links.training, links.decoders)] == [None, "own group"]
    assert [each.sender.options["dynamic"] for each in (links.training, links.evaluation)] == [False, True]
