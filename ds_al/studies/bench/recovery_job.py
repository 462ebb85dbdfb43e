"""A training job in which processes die: started by DeepSpeed's launcher, watched by what its ranks write down.

    job.json          what to do                                    every rank runs this module
    stage_<n>.jsonl   every instruction, kills, metrics             a process that dies leaves its lines behind
    result.json       accuracy, and a hash of each stage's state

A VGG learns Fashion-MNIST, on real images. A process kills itself when it has received a given micro-batch, once.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_LEARNS = ("ForwardPass", "BackwardPass", "OptimizerStep")
_RECEIVES = ("LoadMicroBatch", "RecvActivation")
_POLL = 0.1
_SIZES: dict[str, Any] = {"in_shape": (1, 28, 28), "num_classes": 10}


@dataclass(frozen=True)
class Job:
    """What the ranks do.

    Attributes:
        folder: of this job, absolute.
        method: of :data:`~ds_al.studies.bench.workloads.METHODS`.
        recovers: whether keepers replace processes; else the job saves checkpoints, from which the next one goes on.
        standby: whether processes wait to take the places of those that die.
        stages: number of ranks.
        micro_batch, micro_batches, batches: samples, micro-batches per batch, and batches of the whole job.
        every: micro-batches between two saves.
        kills: ``(stage, micro-batch)`` at which a process dies.
        link: the artificial slow link; ``None`` is none.
    """

    folder: str
    method: str = "streaming"
    recovers: bool = False
    standby: bool = False
    stages: int = 3
    micro_batch: int = 32
    micro_batches: int = 4
    batches: int = 50
    every: int = 32
    kills: Sequence[Sequence[int]] = ()
    link: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Ended:
    """How a job ended.

    Attributes:
        exits: moments at which launchers ended, ``time.time()``, and their exit codes.
        output: of the last launcher.
    """

    exits: Sequence[tuple[float, int]]
    output: str


def launch(job: Job, *, port: int, again: bool, timeout: float, look: Callable[[], None] = lambda: None) -> Ended:
    """Runs a job with DeepSpeed's launcher.

    Args:
        port: at which the ranks meet.
        again: whether to start the launcher again, at once, when it has ended with an error.
        timeout: seconds after which the launcher and all that it has started are killed.
        look: called several times a second.
    """
    folder, exits, deadline = Path(job.folder), list[tuple[float, int]](), time.monotonic() + timeout
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps(asdict(job)))
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(job.stages)),
        *("--master_port", str(port), "--no_local_rank", "--module", __name__, str(folder)),
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parents[3]), os.environ.get("PYTHONPATH", "")]),
    }
    while True:
        with (folder / "output").open("w+") as output:
            process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                while process.poll() is None and time.monotonic() < deadline:
                    time.sleep(_POLL)
                    look()
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                exits.append((time.time(), process.wait()))
            output.seek(0)
            text = output.read()
        if exits[-1][1] == 0 or not again or time.monotonic() > deadline:
            return Ended(exits, text)


def lines(folder: Path, stage: int) -> list[dict[str, Any]]:
    """Returns what the processes of a stage have written down, in their order."""
    path = folder / f"stage_{stage}.jsonl"
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return [json.loads(line) for line in whole.splitlines()]


def result(folder: Path) -> dict[str, Any]:
    """Returns accuracy and hashes of a job that came to its end."""
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


# ---- a rank --------------------------------------------------------------------------------------------


class Lines:
    """Writes what a process of a stage does, in the place of an engine's recorder; kills it where that is planned.

    Args:
        job: the job.
        stage: index of the stage.
        position: returns the micro-batches trained before the first instruction.
    """

    mark = staticmethod(time.time)

    def __init__(self, job: Job, stage: int, *, position: Callable[[], int]) -> None:
        self._folder, self._stage, self._position = Path(job.folder), stage, position
        self._kills = {number for where, number in job.kills if where == stage}
        self._numbers: dict[str, int] = {}
        self._file = os.open(self._folder / f"stage_{stage}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def tell(self, what: str, **facts: Any) -> None:
        """Writes a line."""
        os.write(self._file, (json.dumps({"what": what, "moment": time.time(), **facts}) + "\n").encode())

    def add(self, name: str, start: float, end: float, observed: Any) -> None:
        """Writes an executed instruction."""
        if name not in (*_LEARNS, *_RECEIVES, "SendActivation", "RecvGrad"):
            return
        if not self._numbers:
            self._numbers = dict.fromkeys((*_LEARNS, *_RECEIVES, "SendActivation", "RecvGrad"), self._position())
        number = self._numbers[name]
        self._numbers[name] += 1
        self.tell(name, number=number, start=start, end=end, wait=observed.wait)
        if name in _RECEIVES and number in self._kills:
            self._die(number)

    def skip(self, name: str) -> None:
        """Leaves out an instruction that had nothing to do."""

    def add_layer(self, name: str, layer: int, start: float, end: float) -> None:
        """Leaves out a layer's part of an instruction."""

    def _die(self, number: int) -> None:
        done = self._folder / f"killed_{self._stage}_{number}"
        if not done.exists():
            done.touch()
            self.tell("killed", number=number)
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path) -> None:
    """Trains one rank's stage."""
    import ds_al
    from ds_al.baseline.twin import TwinModule
    from ds_al.config.base import BLOCK
    from ds_al.data import load_vision
    from ds_al.models import build_al, build_twin
    from ds_al.parallel.world import join_world
    from ds_al.schedule import AL_SCHEDULES

    torch.set_num_threads(1)
    job = Job(**json.loads((folder / "job.json").read_text()))
    is_al = job.method in AL_SCHEDULES
    block: dict[str, Any] = {"method": job.method, "link": job.link}
    if job.recovers:
        block["recovery"] = {
            "folder": str(folder / "recovery"),
            "every": job.every,
            "max_restarts": len(job.kills),
            "standby": job.standby,
        }
    config = {
        "train_micro_batch_size_per_gpu": job.micro_batch,
        "gradient_accumulation_steps": job.micro_batches,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
        "gradient_clipping": 0.0,
        "steps_per_print": None,
        BLOCK: block,
    }
    model: Any
    if is_al:
        model = ds_al.ALPipelineModule(build_al("vgg", **_SIZES), num_stages=job.stages, num_classes=10, base_seed=0)
    else:
        join_world()
        loss = torch.nn.CrossEntropyLoss()
        model = TwinModule(build_twin("vgg", **_SIZES), num_stages=job.stages, loss_fn=loss, base_seed=0)
    engine, *_ = ds_al.initialize(model=model, config=config)
    splits = load_vision("fashion-mnist-small")
    trained = engine.stage.trained_micro_batches if is_al else 0
    saved = folder / "checkpoints"
    told = Lines(job, engine.stage_id, position=lambda: engine.stage.trained_micro_batches if is_al else trained)
    told.tell("ready")
    if not job.recovers and (saved / "latest").exists():
        start = time.perf_counter()
        engine.load_checkpoint(str(saved))
        trained = engine.global_steps * job.micro_batches
        told.tell("loaded", seconds=time.perf_counter() - start, position=trained)
    engine.recording.recorder = told
    batches = _batches(splits.train, job, first=trained)
    for batch in range(trained // job.micro_batches, job.batches):
        engine.train_batch(batches)
        if is_al:
            own, first = engine.stage_metrics()[engine.stage_id], engine.layers[0][0]
            told.tell("metrics", values=list(own), losses=engine.report[first].tolist())
        if not job.recovers and (batch + 1) * job.micro_batches % job.every == 0:
            engine.save_checkpoint(str(saved))
    told.tell("done")
    engine.recording.recorder = None
    if not is_al:
        return
    for made in engine.links.reformed:
        told.tell("reformed", **asdict(made))
    test = [(splits.test.make_batch(torch.arange(at, at + 500))) for at in range(0, len(splits.test), 500)]
    accuracy = engine.evaluate(test)["accuracy"][-1]
    hashes = engine.gather(_hash(engine))
    if engine.stage_id == 0:
        (folder / "result.json").write_text(json.dumps({"accuracy": accuracy, "hashes": hashes}))


def _batches(part: Any, job: Job, *, first: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the micro-batches from ``first`` on, in an order that depends on their number alone."""
    order = torch.randperm(len(part), generator=torch.Generator().manual_seed(0))
    for number in range(first, job.batches * job.micro_batches):
        at = torch.arange(number * job.micro_batch, (number + 1) * job.micro_batch) % len(part)
        yield part.make_batch(order[at])


def _hash(engine: Any) -> str:
    """Hash of the weights and buffers of a stage."""
    found = hashlib.sha256()
    for index, layer in engine.layers:
        for name, value in sorted(layer.state_dict().items()):
            found.update(f"{index}.{name}".encode())
            found.update(value.contiguous().numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
