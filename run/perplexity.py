"""Measures the perplexity of a small language model: every objective at every exit, and the backprop twin.

    python run/perplexity.py --seeds 3 --json docs/results/perplexity.json --page docs/language_models.md

Trials choose the learning rate and the number of bridge blocks on validation texts; then every method runs with every
seed. Each finished run is saved in docs/results/perplexity.runs.jsonl, so the same command resumes a stopped study.
--speed measures the time of a step of each method instead, and --table-only runs nothing: it writes the tables and the
page of what there is.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from ds_al.errors import ALError
from ds_al.figures.terminal import Console
from ds_al.launch.ranks import free_port, rank_environment
from ds_al.studies.bench.arguments import positive
from ds_al.studies.language.corpus import Corpus, load_corpus
from ds_al.studies.language.page import write_tables
from ds_al.studies.language.plan import Plan, measured_runs
from ds_al.studies.language.speed import measure_speed, speed_of
from ds_al.studies.language.training import Run, Sizes, train
from ds_al.studies.results import header, write
from ds_al.studies.runs import RunFile, run_missing
from ds_al.system.arguments import output_file


def parser() -> argparse.ArgumentParser:
    """Builds the command line parser."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, default=3, help="number of seeds, starting at 0 (default: 3)")
    p.add_argument("--steps", type=int, default=Plan.steps, help=f"steps at equal tokens (default: {Plan.steps})")
    p.add_argument("--trial-steps", type=int, default=Plan.trial_steps, help=f"steps per trial ({Plan.trial_steps})")
    p.add_argument(
        "--json", metavar="PATH", type=output_file, required=True, help="results file; runs are saved next to it"
    )
    p.add_argument("--page", metavar="PATH", type=output_file, help="also write a page with tables and figure")
    p.add_argument("--data", default="imdb-small", help="text data set: a folder in $DS_AL_DATA, if set")
    p.add_argument("--vocabulary", type=int, default=2048, help="maximum number of BPE tokens (default: 2048)")
    p.add_argument("--cache", metavar="DIR", help="cache folder of tokenizer and tokens")
    p.add_argument("--speed", action="store_true", help="measure the time of a step of every method that is chosen")
    p.add_argument("--repeat", type=positive, default=30, help="with --speed: steps that count (default: 30)")
    p.add_argument("--table-only", action="store_true", help="run nothing; write the tables of the stored runs")
    return p


def main() -> None:
    """Runs the study."""
    args = parser().parse_args()
    console = Console()
    if args.speed and (args.page or args.table_only):
        sys.exit("error: --speed measures alone: leave out --page and --table-only; --table-only --page comes after it")
    plan = replace(Plan(), seeds=args.seeds, steps=args.steps, trial_steps=args.trial_steps)
    file = RunFile.beside(args.json)
    if not args.table_only:
        try:
            if args.speed:
                _speed(plan, file, args, console)
                return
            _run(plan, file, args, console)
        except KeyboardInterrupt:
            console.print("stopped; the same command goes on from here")
        except ALError as error:
            sys.exit(f"error: {error}")
    results = list(file.read().values())
    if not results:
        sys.exit("error: there is no result yet")
    console.print(write_tables(results, plan, json_path=args.json, page=args.page), highlight=False, soft_wrap=True)
    sys.exit(1 if any("failure" in result for result in results) else 0)


def _corpus(args: argparse.Namespace, sizes: Sizes) -> Corpus:
    os.environ.update({name: value for name, value in rank_environment(0, 1, free_port()).items() if value})
    path = Path(os.environ["DS_AL_DATA"], args.data) if "DS_AL_DATA" in os.environ else None
    return load_corpus(
        args.data,
        path=None if path is None else str(path),
        vocabulary=args.vocabulary,
        length=sizes.length,
        validation_fraction=0.05,
        cache_folder=args.cache,
    )


def _speed(plan: Plan, file: RunFile, args: argparse.Namespace, console: Console) -> None:
    """Times a step of each method."""
    sizes = Sizes()
    rows = measure_speed(
        file.read().values(), plan, sizes, _corpus(args, sizes), repeat=args.repeat, tell=partial(_tell, console)
    )
    if not rows:
        sys.exit("error: no settings are chosen yet: run the study without --speed first")
    path = speed_of(args.json)
    write(path, kind="perplexity_speed", header=header(repeat=args.repeat), rows=rows)
    _tell(console, f"written: {path}; --table-only with --page adds it to the page")


def _tell(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True)


def _run(plan: Plan, file: RunFile, args: argparse.Namespace, console: Console) -> None:
    sizes, tell = Sizes(), partial(_tell, console)
    corpus = _corpus(args, sizes)

    def part(name: str, runs: list[Run]) -> None:
        count = iter(range(1, len(runs) + 1))

        def done(run: Run, result: dict[str, object], known: bool) -> None:
            text = result.get("failure") or [round(loss, 4) for loss in result["validation_loss"]]  # type: ignore[attr-defined]
            tell(f"{name} {next(count)} of {len(runs)}{', was there' if known else ''}: {run.key}: {text}")

        run_missing(
            runs,
            file,
            lambda run: train(run, sizes, corpus, test=run.budget != "trial", tell=tell),
            done=done,
        )

    part("trial", list(plan.trials()))
    for _ in range(2):  # the first longer runs choose the rate of the others
        part("run", measured_runs(file.read().values(), plan))


if __name__ == "__main__":
    main()
