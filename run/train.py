"""Trains one network by associated learning, or its backprop twin, as a config file says.

    deepspeed --num_accelerators 2 run/train.py --deepspeed_config ds_configs/fashion_mnist_vgg_al.json

One process is one stage; with a single process all layers train in it, with the same result. --stages 2 on four
processes makes two data parallel copies of the pipeline.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import sys
import time
import traceback
from typing import NoReturn


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
        "bp_gpipe, bp_naive train the backprop twin, bp_dp trains it data parallel, a replica in every process",
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
        metavar="DIR",
        help="goes on from the latest checkpoint in this folder (runs/<name>/<time>/checkpoints)",
    )
    add(
        "--trace",
        action="store_true",
        help="records what every stage did in batches 2 to 6 (or as the config says) into the run's folder: "
        "trace/trace.json opens in Perfetto, timeline.png shows it",
    )
    add(
        "--exit-confidence",
        metavar="P[,P...]",
        help="at the end, lets each test sample leave at the first exit whose softmax gives a class this probability, "
        "and tells accuracy and cost; with --resume, of a network that is trained already",
    )
    add("--json", metavar="PATH", help="also writes the final table to this file, for programs")
    add(
        "--local_rank",
        type=int,
        default=int(os.environ.get("LOCAL_RANK", 0)),
        help="set by the launcher; not for you",
    )
    return p


def main() -> None:
    """Runs one rank."""
    args = parser().parse_args()
    assignments = [
        *args.assignments,
        *(f"{key}={value}" for key, value in {
            "associated_learning.method": args.method,
            "experiment.num_stages": args.stages,
            "experiment.epochs": args.epochs,
            "experiment.seed": args.seed,
            "experiment.output": args.output,
            "experiment.data.path": _string(args.data_path),
            "experiment.data.text_column": _string(args.text_column),
            "experiment.data.label_column": _string(args.label_column),
            "experiment.exit_confidence": args.exit_confidence and f"[{args.exit_confidence}]",
            "associated_learning.trace.enabled": "true" if args.trace else None,
        }.items() if value is not None),
    ]  # fmt: skip
    import torch

    from ds_al.config.base import read_file
    from ds_al.experiment.config import override
    from ds_al.experiment.job import Job, write_json

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    job = Job(override(read_file(args.deepspeed_config), assignments), resume=args.resume)
    summary = job.run()
    if args.json and job.records:
        write_json(args.json, summary)
    job.close()


def _string(value: str | None) -> str | None:
    """As JSON, so that a folder or column called ``2024`` stays a string."""
    return None if value is None else json.dumps(value)


def fail(error: BaseException) -> NoReturn:
    """Ends this rank, its cause shown once and first, and with it the job."""
    from ds_al.errors import ALConfigError, ALDataError, ALError, ALTransportError

    rank = int(os.environ.get("RANK", 0))
    if isinstance(error, ALTransportError) or "Connection closed by peer" in str(error):
        time.sleep(1)  # the neighbour that caused this speaks first
        print(f"rank {rank}: {error}", file=sys.stderr)
    elif isinstance(error, (ALConfigError, ALDataError)):
        if rank == 0:  # all ranks read the same config
            print(f"error: {error}", file=sys.stderr)
    else:
        if not isinstance(error, KeyboardInterrupt):
            traceback.print_exc()
        if isinstance(error, ALError):
            print(f"rank {rank}: {error}", file=sys.stderr)
    leave(1)  # an orderly exit would wait for ranks that wait for this one


def leave(code: int) -> NoReturn:
    """Ends this rank at once. While the interpreter takes itself down, a thread of gloo that frees a tensor just then
    aborts the process (pytorch pull request 179291), after all has been trained and written."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    try:
        main()
        atexit._run_exitfuncs()  # of W&B, and of threads that are to be ended
        leave(0)
    except SystemExit:
        raise
    except BaseException as error:
        fail(error)
