"""Trains networks of the published sizes on CIFAR-10 within a number of minutes: the twin, and AL in K layers.

All runs have the recipe ``ours``, the same samples, batches and number of epochs: as many as fit, by the time that each
takes for a few batches. They are float32, since the recipe's MuonAdamW steps the twin in no other precision.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ds_al.config.base import BLOCK, read_file
from ds_al.experiment.config import override
from ds_al.experiment.job import Job
from ds_al.launch.ranks import tell
from ds_al.studies.parts import ROOT, tell_row
from ds_al.studies.results import Row, StudyError
from ds_al.studies.sweep.runner import history_of

CONFIG = "ds_configs/cifar10_vgg_ours.json"
"""Config of all runs, relative to the root: batches, learning rates, data, recipe."""
_PLANNED = 0.9  # share of the time that is planned with; evaluations and starts vary


@dataclass(frozen=True)
class Runs:
    """What is trained.

    Attributes:
        networks: options of both forms by name of the network.
        layers: numbers of AL layers, K.
        settings: further keys of the config, for every run.
        probe: batches by which the time of an epoch is estimated.
        most: largest number of epochs, by default that of the published experiments.
    """

    networks: Mapping[str, Mapping[str, Any]]
    layers: Sequence[int] = (2, 4)
    settings: Mapping[str, Any] = field(default_factory=dict)
    probe: int = 30
    most: int = 200

    def forms(self) -> Iterator[tuple[str, int | None]]:
        """Yields network and K of each run; K of the twin is ``None``."""
        for network in self.networks:
            for layers in (None, *self.layers):
                yield network, layers

    def config(self, network: str, layers: int | None, **keys: Any) -> dict[str, Any]:
        """Returns the config of a run.

        Args:
            keys: keys of the ``"experiment"`` block.
        """
        values: dict[str, Any] = {
            "experiment.name": f"{network}-{form_name(layers)}",
            "experiment.model.name": network,
            "experiment.model.options": dict(self.networks[network]),
            "experiment.wandb.enabled": False,
            **self.settings,
            **{f"experiment.{key}": value for key, value in keys.items()},
        }
        if layers is None:
            values[BLOCK] = {"method": "bp_1f1b"}
        else:
            values["experiment.model.al_options.num_layers"] = layers
        return override(read_file(ROOT / CONFIG), [f"{key}={json.dumps(value)}" for key, value in values.items()])


PAPER = Runs({"vgg": {"preset": "paper"}, "resnet": {"preset": "paper"}})
"""VGG and ResNet-18 of the published experiments."""


class Probe(NamedTuple):
    """Estimated seconds of a run."""

    epoch: float
    """Of an epoch and its evaluation."""
    fixed: float
    """Of all else: building, the evaluation on the test part, files."""


def measure(*, seconds: float, minutes: float, data: str | None, runs: Runs) -> None:
    """Trains all runs, and tells a row of each as soon as it ends.

    Rows have ``network, K, epochs, batch, micro_batches, samples, seconds_per_epoch, training_seconds,
    validation_accuracy`` (after each epoch) and ``test_accuracy``, of the last exit; ``failure`` is empty, or says why
    there is nothing else.

    Args:
        seconds: time limit of the whole part.
        minutes: time of all runs together; less if the limit says so.
        data: folder of the data set.
        runs: what is trained.

    Raises:
        StudyError: there is no data set, or the time does not suffice for one epoch.
    """
    if data is None:
        raise StudyError("no data set: give the folder of CIFAR-10, with train and test parquet files, by --data-path")
    end = time.monotonic() + _PLANNED * min(60 * minutes, seconds)
    with tempfile.TemporaryDirectory() as folder:
        common = {"data.path": data, "output": folder}
        probes = []
        for network, layers in runs.forms():
            probes.append(probe(runs.config(network, layers, **common), batches=runs.probe))
            tell(f"{network}, {form_name(layers)}: about {probes[-1].epoch:.1f} s per epoch")
        epochs = min(runs.most, epochs_that_fit(probes, end - time.monotonic()))
        tell(f"{epochs} epochs of each of {len(probes)} runs")
        for network, layers in runs.forms():
            config = runs.config(network, layers, **common, epochs=epochs)
            try:
                row = train(config)
            except Exception as error:  # a failure is also a result
                row = {"failure": f"{type(error).__name__}: {error}"}
            tell_row({"network": network, "K": layers, **row})


def epochs_that_fit(probes: Sequence[Probe], seconds: float) -> int:
    """Returns the number of epochs, equal for all runs, that fit into a time.

    Raises:
        StudyError: not one epoch fits.
    """
    epoch, fixed = (sum(column) for column in zip(*probes, strict=True))
    epochs = int((seconds - fixed) / epoch)
    if epochs < 1:
        raise StudyError(
            f"one epoch of {len(probes)} runs takes {fixed + epoch:.0f} s, and {seconds:.0f} s are left: raise "
            "--accuracy-minutes and --minutes"
        )
    return epochs


def probe(config: dict[str, Any], *, batches: int) -> Probe:
    """Estimates the seconds of a run: builds it, trains a few batches, and evaluates once on the validation part."""
    begin = time.perf_counter()
    with _job(config) as job:
        batches = min(batches, job.budget.batches_per_epoch)
        float(job.engine.train_batch())  # the first batch takes longer
        start = time.perf_counter()
        for _ in range(batches):
            loss = job.engine.train_batch()
        float(loss)  # waits for the device
        training = (time.perf_counter() - start) / batches * job.budget.batches_per_epoch
        start = time.perf_counter()
        job.form.evaluate(job.engine, job.data.evaluation_batches("validation"))
        evaluation = time.perf_counter() - start
    return Probe(epoch=training + evaluation, fixed=time.perf_counter() - begin)


def train(config: dict[str, Any]) -> Row:
    """Trains and evaluates one run, and returns its row without the names."""
    with _job(config) as job:
        summary = job.run()
        history = history_of(Path(summary["folder"]))
        return {
            "epochs": summary["epochs"],
            "batch": job.sizes.samples,
            "micro_batches": job.sizes.micro_batches,
            "samples": job.data.facts.sizes["train"],
            "seconds_per_epoch": summary["training_seconds"] / len(history),
            "training_seconds": summary["training_seconds"],
            "validation_accuracy": [epoch["validation_accuracy"][-1] for epoch in history],
            "test_accuracy": summary["test_accuracy"][-1],
            "failure": "",
        }


def form_name(layers: int | None) -> str:
    """Returns the name of the twin, or of AL in K layers."""
    return "twin" if layers is None else f"K = {layers}"


@contextmanager
def _job(config: dict[str, Any]) -> Iterator[Job]:
    """Builds a run; the process group stays for the next one."""
    gc.collect()  # the run before this one: its engine refers to itself
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    job = Job(config)
    try:
        yield job
    finally:
        if job.loader is not None:
            job.loader.close()
        job.engine.destroy()
