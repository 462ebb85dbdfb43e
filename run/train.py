"""Trains one network by associated learning, or its backprop twin, from a config file.

    deepspeed --num_accelerators 2 run/train.py --deepspeed_config ds_configs/fashion_mnist_vgg_al.json

Each process holds one stage; a single process trains all layers, with the same result. --stages 2 on four
processes makes two data parallel replicas of the pipeline.
"""

from __future__ import annotations

import argparse
import json
import os

import torch

from ds_al.config.base import read_file
from ds_al.experiment.config import override
from ds_al.experiment.job import Job, join
from ds_al.experiment.process import run_rank
from ds_al.experiment.run_folder import write_json
from ds_al.parallel.agreement import agreed, flat
from ds_al.system.arguments import output_file


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add(
        "--deepspeed_config",
        metavar="PATH",
        required=True,
        help="JSON config: DeepSpeed's keys and the blocks 'associated_learning' and 'experiment' (docs/config.md)",
    )
    add(
        "--method",
        help="schedule, instead of the config's: streaming, forward_first, parallel_backward, sequential; bp_1f1b, "
        "bp_gpipe, bp_naive, bp_zb_h1, bp_zb_h2, bp_dualpipev train the backprop twin, bp_dp trains it data parallel, "
        "a replica in every process, and bp_async emulates an asynchronous pipeline in one process",
    )
    add("--stages", type=int, help="stages of the pipeline, instead of one per process (experiment.num_stages)")
    add("--epochs", type=int, help="number of epochs, instead of the config's")
    add(
        "--seed",
        type=int,
        help="seed of weights, dropout, data order and validation split, instead of the config's",
    )
    add("--data-path", metavar="DIR", help="folder of parquet files to read the data set from (experiment.data.path)")
    add("--text-column", metavar="NAME", help="the column that holds the text (experiment.data.text_column)")
    add("--label-column", metavar="NAME", help="the column of labels (experiment.data.label_column)")
    add("--output", metavar="DIR", help="folder of all runs, instead of the config's")
    add(
        "--set",
        dest="assignments",
        metavar="KEY.PATH=VALUE",
        action="append",
        default=[],
        help="sets any key of the config, for example --set associated_learning.queue_depth=4; may be repeated",
    )
    add(
        "--resume",
        metavar="DIR|auto",
        help="continues from the latest checkpoint of the run in this folder (runs/<name>/<time>), in a new one; auto "
        "continues the latest run of the experiment in its own folder, from its last complete checkpoint",
    )
    add(
        "--trace",
        action="store_true",
        help="records what every stage does in batches 2 to 6 (or as the config says) into the run's folder: "
        "trace/trace.json opens in Perfetto, timeline.png shows it",
    )
    add(
        "--exit-confidence",
        metavar="P[,P...]",
        help="at the end, lets each test sample leave at the first exit whose softmax gives a class this probability, "
        "and reports accuracy and cost; with --resume, of a network that is trained already",
    )
    add("--json", metavar="PATH", type=output_file, help="also writes the final table to this file, for programs")
    add(
        "--local_rank",
        type=int,
        default=int(os.environ.get("LOCAL_RANK", 0)),
        help="set by the launcher",
    )
    return p


def assignments(args: argparse.Namespace) -> list[str]:
    """What the options set in the config, in the form of ``--set``."""
    options = {
        "associated_learning.method": args.method,
        "experiment.num_stages": args.stages,
        "experiment.epochs": args.epochs,
        "experiment.seed": args.seed,
        "experiment.output": _string(args.output),
        "experiment.data.path": _string(args.data_path),
        "experiment.data.text_column": _string(args.text_column),
        "experiment.data.label_column": _string(args.label_column),
        "experiment.exit_confidence": args.exit_confidence and f"[{args.exit_confidence}]",
        "associated_learning.trace.enabled": "true" if args.trace else None,
    }
    return [*args.assignments, *(f"{key}={value}" for key, value in options.items() if value is not None)]


def _string(value: str | None) -> str | None:
    """As JSON, so that a folder or column called ``2024`` stays a string."""
    return None if value is None else json.dumps(value)


def main() -> None:
    """Runs one rank."""
    args = parser().parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    join()
    config = agreed("the config", lambda: override(read_file(args.deepspeed_config), assignments(args)), facts=flat)
    job = Job(config, resume=args.resume)
    summary = job.run()
    if args.json and job.writes:
        write_json(args.json, summary)
    job.close()


if __name__ == "__main__":
    run_rank(main)
