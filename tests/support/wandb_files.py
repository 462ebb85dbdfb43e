"""Reads W&B's run files back. wandb itself has no Python reader of them any more; the messages are its own."""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class WandbFile:
    """What a run file holds.

    Attributes:
        id, name, project, group, job_type: of the run.
        config: values by key.
        history: logged values by name, in their order.
        steps: the step of each row of the history.
        tags, notes, entity: of the run.
        summary: the summary by key: values logged last, and those that were set.
        artifacts: messages of logged artifacts.
        resume: whether an earlier run of the same id is to be continued.
    """

    def __init__(self, path: Path) -> None:
        self.config: dict[str, Any] = {}
        self.history: dict[str, list[Any]] = defaultdict(list)
        self.steps: list[int] = []
        self.summary: dict[str, Any] = {}
        self.artifacts: list[Any] = []
        for record in _records(path.read_bytes()):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                run = record.run
                self.id, self.name, self.project = run.run_id, run.display_name, run.project
                self.group, self.job_type, self.resume = run.run_group, run.job_type, run.resume
                self.tags, self.notes, self.entity = list(run.tags), run.notes, run.entity
            if kind == "history":
                self.steps.append(record.history.step.num)
            for item in [*record.run.config.update, *record.config.update]:
                self.config[_key(item)] = json.loads(item.value_json)
            for item in record.history.item:
                self.history[_key(item)].append(json.loads(item.value_json))
            for item in [*record.run.summary.update, *record.summary.update, *record.history.item]:
                self.summary[_key(item)] = json.loads(item.value_json)
            if kind == "artifact":
                self.artifacts.append(record.artifact)

    @classmethod
    def of(cls, run: Path) -> WandbFile:
        """The one offline run in a run's folder."""
        (path,) = run.glob("wandb/offline-run-*/run-*.wandb")
        return cls(path)

    def last(self, name: str) -> Any:
        """The value of that name that was logged last."""
        return self.history[name][-1]


def _key(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


def _records(data: bytes) -> Iterator[Any]:
    """Records of a W&B run file: a LevelDB log of protobuf messages after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    position, message = 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # a block's tail is too short for a chunk's header
            position += 32768 - position % 32768
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        message += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last chunk
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            message = b""
            yield record
