"""Fine-tunes a pretrained encoder by back-propagation and by local learning, on the same texts.

    python run/finetune.py --pretrained DIR --data-root DIR --json docs/results/pretrained.json \\
      --page docs/pretrained.md

DIR of --pretrained is a folder that save_pretrained of transformers writes, with its tokenizer. Trials choose each
method's learning rate on validation texts; then every method runs with every seed. Each finished run is saved in
docs/results/pretrained.runs.jsonl, so the same command, also with another selection, goes on from there; two commands
with different selections may run at the same time. --speed measures two stages instead. --table-only runs nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ds_al.errors import ALError
from ds_al.figures.terminal import Console
from ds_al.launch.ranks import RankFailure, free_port, rank_environment
from ds_al.studies.bench.arguments import names, numbers, positive
from ds_al.studies.pretrained.page import speed_of, write_tables
from ds_al.studies.pretrained.plan import Plan
from ds_al.studies.pretrained.speed import measure_speed
from ds_al.studies.pretrained.texts import SOURCES, load_texts
from ds_al.studies.pretrained.training import Run, check_peft, train
from ds_al.studies.results import header, read, write
from ds_al.studies.runs import RunFile, run_missing
from ds_al.system.arguments import more_than_zero, output_file

ADAPT = ("all", "frozen", "lora")


def parser() -> argparse.ArgumentParser:
    """Builds the command line parser."""
    whole = Plan()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--pretrained", metavar="DIR", type=Path, help="folder of the model and its tokenizer")
    p.add_argument(
        "--data-root", metavar="DIR", type=Path, default=os.environ.get("DS_AL_DATA", "."),
        help="folder of the data sets (default: $DS_AL_DATA, else the working directory)",
    )  # fmt: skip
    p.add_argument(
        "--json", metavar="PATH", type=output_file, required=True, help="results file; runs are saved next to it"
    )
    p.add_argument("--page", metavar="PATH", type=output_file, help="also write the page")
    p.add_argument(
        "--data", type=partial(names, known=tuple(SOURCES)), default=whole.data,
        help=f"comma-separated, of {','.join(SOURCES)} (default: {','.join(whole.data)})",
    )  # fmt: skip
    p.add_argument(
        "--methods", type=partial(names, known=whole.methods), default=whole.methods,
        help=f"objectives beside back-propagation, comma-separated (default: {','.join(whole.methods)}); the first one "
        "also runs frozen, there also cut by work, and with adapters",
    )  # fmt: skip
    p.add_argument(
        "--adapt", type=partial(names, known=ADAPT), default=whole.adapt,
        help="what of the model trains, comma-separated (default: all,frozen,lora; lora needs peft)",
    )  # fmt: skip
    p.add_argument(
        "--classifier-pooling", choices=["mean"],
        help="what the head reads of the tokens, in the twin too (default: what the model's class reads)",
    )  # fmt: skip
    p.add_argument("--layers", type=numbers, default=whole.layers, help="K, comma-separated (default: 2,3,6)")
    p.add_argument("--seeds", type=positive, default=whole.seeds, help="number of seeds, from 0 (default: 3)")
    p.add_argument("--samples", type=positive, default=whole.samples, help=f"texts of a run ({whole.samples})")
    p.add_argument(
        "--trial-samples", type=positive, default=whole.trial_samples, help=f"texts of a trial ({whole.trial_samples})"
    )
    p.add_argument(
        "--also-rates", type=rates, default=(),
        help="also run all methods at these learning rates, comma-separated, as where a method fails at the chosen one",
    )  # fmt: skip
    p.add_argument(
        "--minutes", type=more_than_zero, help="start no run after this many minutes (default: run all of them)"
    )
    p.add_argument("--cache", metavar="DIR", help="cache folder of tokens")
    p.add_argument("--table-only", action="store_true", help="run nothing; write the tables of the stored runs")
    p.add_argument(
        "--speed", action="store_true", help="measure samples per second and memory of two stages, of the first texts"
    )
    p.add_argument("--micro-batches", type=positive, default=8, help="with --speed: M (default: 8)")
    p.add_argument("--batches", type=positive, default=2, help="with --speed: batches of a timed run (default: 2)")
    p.add_argument("--repeat", type=positive, default=9, help="with --speed: timed runs of each case (default: 9)")
    return p


def rates(text: str) -> tuple[float, ...]:
    """Parses comma-separated learning rates."""
    return tuple(more_than_zero(part) for part in text.split(","))


def main() -> None:
    """Runs the study."""
    args, console = parser().parse_args(), Console()
    if args.speed and (args.page or args.table_only):
        sys.exit("error: --speed measures alone: leave out --page and --table-only; --table-only --page comes after it")
    plan = Plan(
        args.data, args.methods, args.adapt, args.layers, args.seeds, args.samples, args.trial_samples,
        pooling=args.classifier_pooling,
    )  # fmt: skip

    def tell(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    try:
        if not args.table_only:
            if args.pretrained is None:
                sys.exit("error: give --pretrained DIR, the folder of a model and its tokenizer, or --table-only")
            if "lora" in plan.adapt:
                check_peft()
            if args.speed:
                _speed(plan, args, tell)
                return
            _run(plan, args, tell)
        file = RunFile.beside(args.json)
        results = list(file.read().values())
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    except (ALError, RankFailure) as error:
        sys.exit(f"error: {error}")
    tell(write_tables(results, plan, json_path=args.json, page=args.page))
    sys.exit(1 if any("failure" in result for result in results) else 0)


def _run(plan: Plan, args: argparse.Namespace, tell: Callable[[str], None]) -> None:
    """Executes the trials, then the runs with the chosen rates."""
    os.environ.update({name: value for name, value in rank_environment(0, 1, free_port()).items() if value})
    file, end = RunFile.beside(args.json), time.monotonic() + 60 * (args.minutes or float("inf"))
    texts = {
        name: load_texts(name, root=Path(args.data_root), pretrained=args.pretrained, cache=args.cache)
        for name in plan.data
    }

    def one(run: Run) -> dict[str, Any]:
        return train(run, plan.settings, texts[run.data], pretrained=args.pretrained, tell=tell)

    def part(name: str, runs: list[Run]) -> None:
        count = iter(range(1, len(runs) + 1))

        def done(run: Run, result: dict[str, Any], known: bool) -> None:
            text = result.get("failure") or [round(value, 4) for value in result["validation_accuracy"]]
            tell(f"{name} {next(count)} of {len(runs)}{', was there' if known else ''}: {run.key}: {text}")

        run_missing(runs, file, one, done=done, until=end)

    part("trial", list(plan.trials()))
    part("run", list(dict.fromkeys([*plan.runs(file.read().values()), *plan.at(args.also_rates)])))


def _speed(plan: Plan, args: argparse.Namespace, tell: Callable[[str], None]) -> None:
    """Measures two stages; rows of other texts, or of what else trains, stay in the file if the settings are theirs."""
    measured = measure_speed(
        args.pretrained,
        data=plan.data[0],
        methods=plan.methods,
        adapt=plan.adapt,
        settings=plan.settings,
        micro_batches=args.micro_batches,
        batches=args.batches,
        repeat=args.repeat,
    )
    path, about = speed_of(args.json), header(batches=args.batches, repeat=args.repeat)
    rows = [{**row, "date": about["date"]} for row in measured]
    if path.exists():
        before, again = read(path), {(row["data"], row["adapt"]) for row in rows}
        kept = [
            {"date": before.header["date"], **row}
            for row in before.rows
            if (row["data"], row["adapt"]) not in again
        ]  # fmt: skip
        if kept and before.header["settings"] != about["settings"]:
            tell(f"{len(kept)} rows measured with {before.header['settings']} are removed: they do not compare")
        else:
            rows = [*kept, *rows]
    write(path, kind="pretrained_speed", header=about, rows=rows)
    tell(f"written: {path}; --table-only with --page adds it to the page")


if __name__ == "__main__":
    main()
