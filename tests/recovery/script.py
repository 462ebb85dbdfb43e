"""What the ranks of these tests run: a script that trains, evaluates and saves, and in which processes die."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_al.checkpoint import writer
from ds_al.parallel import worker
from ds_al.parallel.world import join_world
from tests.group.networks import Layers, network
from tests.support.engines import MICRO_BATCHES, State, engine_state, make_engine
from tests.support.networks import NETWORKS

BATCHES = 10
EVALUATED, SAVED = (2, 6), (4,)  # after these batches


class Death(NamedTuple):
    """Where one process ends: its rank, its number among the processes of the rank, the point, and the batch or
    micro-batch there."""

    rank: int
    process: int
    point: str
    at: int
    how: str = "SIGKILL"


class Result(NamedTuple):
    """What a rank returns."""

    state: State
    losses: list[float]
    all_losses: Tensor
    evaluated: list[Any]
    drawn: list[float]


class Script:
    """One rank's run.

    Args:
        folder: where processes are counted, and checkpoints are saved.
        deaths: of all ranks.
    """

    def __init__(self, folder: str, deaths: list[Death]) -> None:
        rank, processes = int(os.environ["RANK"]), Path(folder) / f"processes_{os.environ['RANK']}"
        number = len(processes.read_text().split()) if processes.exists() else 0
        if worker.IS_WORKER:
            with processes.open("a") as file:
                file.write(f"{os.getpid()}\n")
        self.folder, self.batch = folder, -1
        self.own = {(death.point, death.at): death.how for death in deaths if death[:2] == (rank, number)}

    def pass_by(self, point: str, at: int) -> None:
        """Ends the process where that is planned."""
        how = self.own.get((point, at)) if worker.IS_WORKER else None
        if how == "exit":
            os._exit(3)
        elif how == "keeper":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)
        elif how == "wait":
            time.sleep(120)
        elif how == "raise":
            raise ValueError("this layer fails")
        elif how is not None:
            os.kill(os.getpid(), getattr(signal, how))
            time.sleep(60)

    def run(self, *, layers: Layers | None = None, name: str = "mlp", **options: Any) -> Result:
        """Trains, evaluates and saves; with ``layers`` a network of 8 blocks in this many AL layers,
        by its name."""
        net = NETWORKS["mlp"] if layers is None else network(name, layers)
        engine = make_engine(net, **options)
        _before(engine.layers[0][1].f, lambda: self._in_forward(engine))
        save = writer.write_tensors
        writer.write_tensors = lambda *args: (self.pass_by("save", self.batch), save(*args))[1]
        torch.manual_seed(3)
        x, labels = net.batches(1)[0]
        data, evaluated, losses, drawn = _noisy(x, labels), [], [], []
        for self.batch in range(BATCHES):
            self.pass_by("between", self.batch)
            losses.append(engine.train_batch(data).item())
            drawn.append(torch.rand(()).item())
            if self.batch in EVALUATED:
                held_out = torch.utils.data.DataLoader(list(zip(x, labels, strict=True)), batch_size=3, shuffle=True)
                evaluated.append(engine.evaluate(held_out))
                evaluated.append(engine.predict(x[:2]).tolist())
                evaluated.append(engine.eval_batch(data, num_micro_batches=2).item())
            if self.batch in SAVED:
                engine.save_checkpoint(f"{self.folder}/checkpoints")
        self.pass_by("end", 0)
        all_losses = engine.gather_losses()
        self.pass_by("end", 1)
        return Result(engine_state(engine), losses, all_losses, evaluated, drawn if engine.is_first_stage() else [])

    def _in_forward(self, engine: Any) -> None:
        if engine.calls.current == "train_batch":
            self.pass_by("forward", engine.stage.next_micro_batch)
        else:
            self.pass_by("evaluate", self.batch)


def run(folder: str, deaths: list[Death], **options: Any) -> Result:
    """Worker: one rank."""
    join_world()  # a standby waits here, and is counted once it has its turn
    return Script(folder, deaths).run(**options)


def _before(module: Any, call: Callable[[], None]) -> None:
    module.register_forward_pre_hook(lambda *_: call())


def _noisy(x: Tensor, labels: Tensor) -> Iterator[Any]:
    """A stream that draws from the user's generator."""
    while True:
        yield x + torch.rand(()), labels


__all__ = ["BATCHES", "MICRO_BATCHES", "Death", "Result", "run"]
