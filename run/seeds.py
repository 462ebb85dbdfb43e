"""Trains one config with several seeds, and reports mean and standard deviation of accuracy and time.

python run/seeds.py --deepspeed_config ds_configs/fashion_mnist_vgg_al.json --json docs/results/main_job.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ds_al.figures.terminal import Console
from ds_al.launch.ranks import free_port
from ds_al.studies.results import header, write
from ds_al.studies.tables.write import Column, listed, terminal

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("seed", "test_accuracy", "training_seconds", "samples_per_second", "idle", "peak_activation_bytes")


def train(config: str, *, seed: int, processes: int, extra: list[str]) -> dict[str, Any]:
    """Trains one run with DeepSpeed's launcher, and returns its summary.

    Raises:
        SystemExit: the run failed; the exit code is that of the run.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "summary.json"
        command = [
            *(sys.executable, "-m", "deepspeed.launcher.runner"),
            *("--num_accelerators", str(processes), "--master_port", str(free_port())),
            *(str(ROOT / "run/train.py"), "--deepspeed_config", config),
            *("--seed", str(seed), "--json", str(path), *extra),
        ]
        code = subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ}).returncode
        if code:
            raise SystemExit(code)
        return json.loads(path.read_text())


def main() -> None:
    """Runs all seeds, prints a table and writes JSON and CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", metavar="PATH", required=True, help="config of run/train.py")
    parser.add_argument("--seeds", default="0,1,2", help="seeds, separated by commas")
    parser.add_argument("--processes", type=int, default=2, help="number of processes, one stage each")
    parser.add_argument("--json", metavar="PATH", help="write the rows to PATH, and a CSV file next to it")
    args, extra = parser.parse_known_args()
    rows = [
        train(args.deepspeed_config, seed=int(seed), processes=args.processes, extra=extra)
        for seed in args.seeds.split(",")
    ]
    total = {
        key: {"mean": statistics.mean(values), "sd": statistics.stdev(values) if len(values) > 1 else 0.0}
        for key, values in {
            "test_accuracy": [row["test_accuracy"][-1] for row in rows],
            "training_seconds": [row["training_seconds"] for row in rows],
            "samples_per_second": [row["samples_per_second"] for row in rows],
        }.items()
    }
    flat = [{c: row[c][-1] if c == "test_accuracy" else row[c] for c in COLUMNS} for row in rows]
    console = Console()
    console.print(terminal(listed(flat, [Column(name, f"{{{name}}}") for name in COLUMNS])))
    for key, value in total.items():
        console.print(f"{key}: mean {value['mean']:.4f}, sd {value['sd']:.4f}", highlight=False)
    if args.json:
        write(Path(args.json), kind="seeds", header=header(summary=total), rows=flat)


if __name__ == "__main__":
    main()
