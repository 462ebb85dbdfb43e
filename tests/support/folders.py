"""Makes run folders as :mod:`ds_al.experiment.run_folder` writes them, without training."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

TRACE_COLUMNS = ["stage", "instruction", "micro_batch", "layer", "start", "end", "wait", "nbytes", "queue", "memory"]
ACCURACIES = {"streaming": (0.90, 0.91, 0.92), "bp_1f1b": (0.93, 0.93, 0.96), "bp_async": (0.92, 0.92, 0.92)}


def make_run(
    parent: Path,
    *,
    method: str = "streaming",
    seed: int = 0,
    time: str | None = None,
    name: str = "vgg",
    epochs: int = 3,
    batches: int = 4,
    finished: bool = True,
    trace: int = 0,
    config: dict[str, Any] | None = None,
    **facts: Any,
) -> Path:
    """Writes one run of two stages and returns its folder.

    Args:
        parent: the folder of all runs.
        trace: batches of the trace; 0 for none.
        config: keys of the config to replace.
        facts: keys of ``resolved`` and the summary to replace; ``None`` leaves one out.
    """
    local = not method.startswith("bp_")
    folder = parent / name / (time or f"20261124-10{seed:02d}{'00' if local else '30'}")
    folder.mkdir(parents=True)
    resolved = {
        "method": method,
        "stages": 2,
        "micro_batches": 2,
        "micro_batch_size": 50,
        "partition": [0, 1, 3],
        "layers": 3,
        "model": {"name": "vgg", "options": {}, "al_options": {}, "twin_options": {}},
        "data": {"name": "fashion", "validation_fraction": 0.1, "augment": "flip", "eval_batch_size": 250},
        "seed": seed,
        "versions": {"torch": "2.13.0", "deepspeed": "0.19.8", "python": "3.11.7"},
        "date": f"2026-11-24 10:0{seed}:00",
        "cores": 2,
        "cpu": "AMD EPYC",
        "device": "cpu",
        "git_commit": "0123abc",
        "command": f"deepspeed run/train.py --method {method} --seed {seed}",
    }
    summary = {
        "name": name,
        "epochs": epochs,
        "test_accuracy": [0.5, 0.7, ACCURACIES[method][seed % 3]] if local else [ACCURACIES[method][seed % 3]],
        "test_samples": 2000,
        "training_seconds": 10.0 + seed,
        "samples_per_second": 1000.0 + seed,
        "idle": [0.1, 0.05],
        "peak_activation_bytes": [2**21, 2**20],
        "bytes_sent": [2**22, 0] if local else [None, None],
        "parameters": [100, 200],
    }
    for key, value in facts.items():
        for part in (resolved, summary):
            part.pop(key, None)
        if value is not None:
            summary[key] = value
            resolved[key] = value
    settings = {
        "train_micro_batch_size_per_gpu": 50,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.003}},
        "associated_learning": {"method": method, "steps_per_batch": 1},
        "experiment": {"name": name, "epochs": epochs, "seed": seed, "output": str(parent)},
        **(config or {}),
    }
    _json(folder / "config.json", {**settings, "resolved": resolved})
    with (folder / "metrics.jsonl").open("w") as file:
        for epoch in range(1, (epochs if finished else epochs - 1) + 1):
            for batch in range(batches if local else 0):
                row = {"kind": "batch", "epoch": epoch, "batch": (epoch - 1) * batches + batch + 1}
                file.write(json.dumps({**row, "losses": [[0.4 / epoch, 0.2], [0.3, 0.1], [0.2, 0.1]]}) + "\n")
            losses = {"associated_loss": [0.4, 0.3, 0.2], "autoencoder_loss": [0.2, 0.1, 0.1]}
            row = {
                "kind": "epoch",
                "epoch": epoch,
                "seconds": 4.0 + seed,
                "samples_per_second": 1000.0,
                "learning_rate": 0.003,
                "idle": [0.1, 0.05],
                "wait_data": 0.1,
                "bytes_sent": [2**20, 0] if local else [None, None],
                **(losses if local else {"loss": 1.0 / epoch}),
                "validation_accuracy": [0.4, 0.5, 0.6 + epoch / 10] if local else [0.65 + epoch / 10],
            }
            file.write(json.dumps(row) + "\n")
    if finished:
        _json(folder / "summary.json", {**summary, **resolved})
    if trace:
        make_trace(folder, batches=trace)
    return folder


def make_seeds(parent: Path, **options: Any) -> None:
    """Three seeds of streaming and of its twin; streaming's first seed has a trace."""
    for method in ("streaming", "bp_1f1b"):
        for seed in range(3):
            make_run(parent, method=method, seed=seed, trace=4 if method == "streaming" and not seed else 0, **options)


def make_trace(folder: Path, *, batches: int) -> None:
    """Two stages, two micro-batches per batch, one second per pass, forwards with slices of layers."""
    rows: list[list[Any]] = []
    for micro_batch in range(2 * batches):
        for stage in range(2):
            start = 3.0 * micro_batch + stage
            if stage:
                rows.append([1, "RecvActivation", micro_batch, "", start - 1, start, 0.9, 400, 1, ""])
            rows.append([stage, "ForwardPass", micro_batch, "", start, start + 1, 0, "", "", 4096])
            rows.append([stage, "ForwardPass", micro_batch, stage, start, start + 1, 0, "", "", 4096])
            rows.append([stage, "BackwardPass", micro_batch, "", start + 1, start + 1.9, 0, "", "", 0])
            rows.append([stage, "OptimizerStep", micro_batch, "", start + 1.9, start + 2, 0, "", "", 0])
    (folder / "trace").mkdir()
    with (folder / "trace" / "trace.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(TRACE_COLUMNS)
        writer.writerows(rows)


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2))
