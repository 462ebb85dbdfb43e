"""Writes the results of the fine-tuning study: JSON, Markdown tables, and a page."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ds_al.figures.parts import Table
from ds_al.studies.pretrained.plan import Form, Plan
from ds_al.studies.pretrained.texts import SOURCES
from ds_al.studies.pretrained.training import TWIN
from ds_al.studies.results import header, machine_and_versions, read, write
from ds_al.studies.runs import Result, same_machine
from ds_al.studies.tables import pretrained as tables
from ds_al.studies.tables.write import document

Row = dict[str, Any]

COMMAND = (
    "python run/finetune.py --pretrained DIR --data-root DIR --json docs/results/pretrained.json "
    "--page docs/pretrained.md"
)
POOLINGS = (None, "mean")
LEVEL = 0.005
"""Share of the test texts by which a method that keeps up may be behind."""
_WHERE = {
    "all": "",
    "frozen": ", where the lower half of the blocks is frozen in both",
    "lora": ", where low-rank adapters train in both",
}
NOTHING = (
    "**Not run yet.** There is no result: nothing on this page says that local learning keeps up with back-propagation "
    "on a pretrained model. The commands, the plan and the settings below are what the study will run."
)

_ABOUT_SPEED = (
    "Two processes, M micro-batches of 16 texts per batch. Local learning is cut where its layers are, in the middle "
    "of the blocks, `-by-work` where back-propagation is. Back-propagation (1F1B and zero bubble) is cut where its "
    "stages have the most even work: in the middle too, but with frozen blocks after the first block that trains, "
    "since blocks below it have no backward. Samples per second are medians of {repeat} timed runs of {batches} "
    "batches, all methods of the table in turns."
)


def rows(results: Iterable[Result], plan: Plan) -> list[Row]:
    """Returns one row per form, K and rate: test accuracy at each exit, and the gap to back-propagation of the same
    seed.

    Only runs with the plan's samples are included. ``seeds`` counts the runs of a row; ``best`` says whether no other
    rate has more of them, or as many and a better validation accuracy. Gaps are to the best rate of back-propagation.
    ``cpu_ms``, the processor time of a text, is ``None`` where a run and its twin ran on different machines.
    """
    found = {result["key"]: result for result in results if "failure" not in result}
    own: dict[tuple[Form, int], dict[float, list[Result]]] = {}
    for run in plan.at(sorted({result["lr"] for result in found.values()})):
        if run.key in found:
            at = own.setdefault(((run.data, run.method, run.adapt), run.layers), {})
            at.setdefault(run.lr, []).append(found[run.key])
    best = {key: max(at.values(), key=_validated) for key, at in own.items()}
    twins = {
        (data, adapt, result["seed"]): result
        for ((data, method, adapt), _), runs in best.items()
        if method == TWIN
        for result in runs
    }
    return [
        {**_row(form, layers, runs, twins), "best": runs is best[form, layers]}
        for (form, layers), at in sorted(own.items(), key=lambda item: _place(item[0], plan))
        for runs in at.values()
    ]


def _place(key: tuple[Form, int], plan: Plan) -> tuple[int, int]:
    return plan.forms().index(key[0]), key[1]


def _validated(runs: Sequence[Result]) -> tuple[int, float]:
    return len(runs), statistics.mean(result["validation_accuracy"][-1] for result in runs)


def _row(form: Form, layers: int, own: Sequence[Result], twins: dict[tuple[str, Any, int], Result]) -> Row:
    data, method, adapt = form
    last = [result["test_accuracy"][-1] for result in own]
    pairs = [(result, twins.get((data, adapt, result["seed"]))) for result in own]
    gaps = [result["test_accuracy"][-1] - twin["test_accuracy"][-1] for result, twin in pairs if twin is not None]
    chosen = [result["test_accuracy"][_best_exit(result)] for result in own]
    chosen_gaps = [
        exit_ - twin["test_accuracy"][-1] for exit_, (_, twin) in zip(chosen, pairs, strict=True) if twin is not None
    ]
    cpu = [1000 * result["cpu_seconds"] / result["samples"] for result in own]
    early = [result["early_accuracy"][-1] for result in own if result["early_accuracy"]]
    averaged = [result.get("averaged_test_accuracy") for result in own]
    known = [value for value in averaged if value is not None]
    return {
        "data": data,
        "method": method,
        "adapt": adapt,
        "pooling": own[0].get("pooling"),
        "K": layers,
        "seeds": len(own),
        "lr": own[0]["lr"],
        "samples": own[0]["samples"],
        "accuracy": statistics.mean(last),
        "accuracy_sd": statistics.stdev(last) if len(last) > 1 else None,
        "exits": [statistics.mean(column) for column in zip(*(result["test_accuracy"] for result in own), strict=True)],
        "chosen": statistics.mean(chosen),
        "chosen_gap": statistics.mean(chosen_gaps) if chosen_gaps and method != TWIN else None,
        "averaged": statistics.mean(known) if len(known) == len(own) else None,
        "gap": statistics.mean(gaps) if gaps and method != TWIN else None,
        "gap_sd": statistics.stdev(gaps) if len(gaps) > 1 and method != TWIN else None,
        "early": statistics.mean(early) if early else None,
        "trained_share": own[0]["trained_weights"] / own[0]["weights"],
        "cpu_ms": statistics.mean(cpu) if all(same_machine(result, twin) for result, twin in pairs) else None,
    }


def _best_exit(result: Result) -> int:
    """Returns the first of the exits with the best validation accuracy."""
    accuracies = result["validation_accuracy"]
    return int(accuracies.index(max(accuracies)))


def write_tables(results: Sequence[Result], plan: Plan, *, json_path: Path, page: Path | None) -> str:
    """Writes JSON and CSV, and the page; returns the tables in Markdown."""
    plans = [replace(plan, pooling=pooling) for pooling in POOLINGS]
    table = [row for each in plans for row in rows(results, each)]
    about = header(runs=results, seeds=plan.seeds, samples=plan.samples, trial_samples=plan.trial_samples)
    if table:
        flat = [{**row, "exits": " ".join(f"{value:.4f}" for value in row["exits"])} for row in table]
        write(json_path, kind="pretrained", header=about, rows=flat)
    if page is not None:
        page.write_text(whole_page(results, table, plans, about, speed=speed_of(json_path)))
    return document(*found(results, table, plans))


def speed_of(json_path: Path) -> Path:
    """Returns the file of times and memory that belongs to a results file."""
    return json_path.with_name(f"{json_path.stem}_speed.json")


def found(results: Sequence[Result], table: Sequence[Row], plans: Sequence[Plan]) -> list[Table | str]:
    """Returns the tables with their headings: accuracy by texts and by what the head reads, trials, failures."""
    blocks: list[Table | str] = []
    for name in plans[0].data:
        for plan in plans:
            own = [row for row in table if (row["data"], row["pooling"]) == (name, plan.pooling)]
            if own:
                head = "" if plan.pooling is None else f"; the head reads the {plan.pooling}"
                blocks += [f"### {SOURCES[name].title}{head}", tables.accuracy(own)]
    failures = [f"* `{r['key']}`: {r['failure']}" for r in results if "failure" in r]
    tried = [line for plan in plans for line in _trials(results, plan)]
    blocks += ["### Trials", tables.trials(tried) if tried else "None."]
    return [*blocks, "### Failures", "\n".join(failures) or "None."]


def _trials(results: Sequence[Result], plan: Plan) -> list[Row]:
    known, chosen = {r["key"]: r for r in results if "failure" not in r}, plan.chosen(results)
    lines: list[Row] = []
    for form in plan.forms():
        own = [run for run in plan.trials() if (run.data, run.method, run.adapt) == form]
        if not any(run.key in known for run in own):
            continue
        tried = "; ".join(
            f"{run.lr:g}: {100 * known[run.key]['validation_accuracy'][-1]:.1f}"
            if run.key in known
            else f"{run.lr:g}: -"
            for run in own
        )
        best = f"{chosen[form]:g}" if form in chosen else ""
        line = {"data": form[0], "method": form[1], "adapt": form[2], "pooling": plan.pooling}
        lines.append({**line, "tried": tried, "chosen": best})
    return lines


def whole_page(
    results: Sequence[Result], table: Sequence[Row], plans: Sequence[Plan], about: Row, *, speed: Path
) -> str:
    """Returns the page: what there is, the question, settings, tables, and how many seeds have run."""
    plan = plans[0]
    blocks: list[Table | str] = ["# Fine-tuning a pretrained model: local learning beside back-propagation"]
    if table:
        blocks += [_wrapped(f"Generated by `{COMMAND}`, {machine_and_versions(about)}", mark="")]
        blocks += [
            _answer(table, each, adapt)
            for each in plans
            for adapt in _WHERE
            if (each.pooling, adapt) == (None, "all") or _complete(table, each, adapt)
        ]
    else:
        blocks += [_wrapped(NOTHING, mark=""), f"Command: `{COMMAND}`"]
    blocks += [_wrapped(*_about(plan)), "## Accuracy", *found(results, table, plans), "## Two stages"]
    if speed.exists():
        measured = read(speed)
        blocks += [
            _wrapped(_ABOUT_SPEED.format(**measured.header["settings"]), mark=""),
            tables.speed(measured.rows),
            _wrapped(f"{_measured(measured.rows)} {machine_and_versions(measured.header)}", mark=""),
        ]
    else:
        blocks.append(f"Not run yet: `{COMMAND.split(' --json')[0]} --speed --json docs/results/pretrained.json`")
    there: dict[tuple[Form, int], int] = {}
    for row in _of(table, plan):
        at = (row["data"], row["method"], row["adapt"]), row["K"]
        there[at] = max(there.get(at, 0), row["seeds"])
    if any(there.get((form, depth), 0) < plan.seeds for form in plan.forms() for depth in plan.depths(form)):
        about_k = f"Seeds that have run, of {plan.seeds}; of local learning by K = {', '.join(map(str, plan.layers))}."
        blocks += ["## Not run yet", about_k, tables.seeds(_seeds(there, plan))]
    return document(*blocks)


def _measured(rows: Iterable[Mapping[str, Any]]) -> str:
    """Says when each kind of weights that train was measured; what is compared comes from one run."""
    dates = {f"{row['data']}, {row['adapt']}": row.get("date") for row in rows}
    return (
        f"Measured: {'; '.join(f'{what}, {date}' for what, date in dates.items() if date)}."
        if any(dates.values())
        else ""
    )


def _of(table: Sequence[Row], plan: Plan) -> list[Row]:
    return [row for row in table if row["pooling"] == plan.pooling]


def _complete(table: Sequence[Row], plan: Plan, adapt: str) -> list[Row]:
    """Returns the rows at K = 2 and 3 that have run with all seeds, at their best rate."""
    return [
        row for row in _of(table, plan)
        if row["adapt"] == adapt and row["K"] in (2, 3) and row["gap"] is not None
        and row["seeds"] == plan.seeds and row["best"]
    ]  # fmt: skip


def _answer(table: Sequence[Row], plan: Plan, adapt: str) -> str:
    """Returns, first, the worst and the best gap at K = 2 and 3 of what has run with all seeds."""
    own = _complete(table, plan, adapt)
    head = "" if plan.pooling is None else f", if the head reads the {plan.pooling} over the tokens in both"
    head += _WHERE[adapt]
    if not own:
        text = f"**No conclusion yet{head}**: no method has run with all {plan.seeds} seeds beside back-propagation."
        return _wrapped(f"{text} What has run is below.", mark="")
    level, chosen = (sum(row[gap] >= -LEVEL for row in own) for gap in ("gap", "chosen_gap"))
    verdict = (
        f"**Local learning keeps up with back-propagation in {level} of {len(own)} cases{head}**: its last exit is at "
        f"most {100 * LEVEL:.1f} points behind; the exit chosen on validation texts in {chosen} of {len(own)}. A case "
        f"is texts, a method, and K = 2 or 3, with all {plan.seeds} seeds."
    )
    best, worst = max(own, key=lambda row: row["gap"]), min(own, key=lambda row: row["gap"])
    lines = [
        f"{what}: `{row['method']}`, K = {row['K']}, {SOURCES[row['data']].title}: {100 * row['gap']:+.1f} points "
        f"beside back-propagation ({row['seeds']} seeds)."
        for what, row in (("Worst", worst), ("Best", best))
    ]
    return _wrapped(verdict, *lines)


def _numbers(rates: tuple[float, ...]) -> str:
    return ", ".join(f"{lr:g}" for lr in rates)


def _about(plan: Plan) -> list[str]:
    settings = plan.settings
    return [
        f"Every run trains on {plan.samples:,} texts in steps of {settings.batch}: the same texts in the same order "
        "for all methods of a seed. AdamW, weight decay 0.01, warm-up over a tenth of the steps, then cosine decay.",
        f"The learning rate of the model's weights is chosen among {_numbers(plan.rates)}, that of adapters among "
        f"{_numbers(plan.adapter_rates)}, by the accuracy of the last exit on {settings.held_out} validation texts: a "
        f"trial of {plan.trial_samples:,} texts at each rate for every method, with its least K and seed 0. Test texts "
        f"({settings.tested:,}) are looked at by the runs alone.",
        f"New parts (bridges, codes, the classifier; of the twin the classifier) have a learning rate of "
        f"{settings.new_rate:g}, and train alone on the first {settings.new_first} texts "
        "([from_your_model.md](from_your_model.md#new-parts)).",
        "`backprop` is back-propagation through the whole model. *All* trains every weight; *frozen* trains all but "
        'the embeddings and the lower half of the blocks (`-by-work`: `groups="by-work"`, K layers of as even '
        "work, where a block that trains counts as much as three below all that train, instead of as many blocks "
        "each); *lora* trains low-rank "
        f"adapters of rank {settings.rank} in {', '.join(settings.targets)}, and the new parts.",
        "The last exit is the model's own head, which reads one token, the first; earlier exits read the mean over the "
        'tokens. Where a heading says so, the head reads the mean, too (`classifier_pooling="mean"`, '
        "[from_your_model.md](from_your_model.md#new-parts)), in back-propagation as well.",
        "*Gap* compares the last exit with back-propagation of the same seed and of the same weights that train; "
        "*chosen exit* is the test accuracy, and in brackets its gap, at the exit of each run whose validation "
        "accuracy is best, which costs no operations of later layers; *averaged* is the accuracy of the mean softmax "
        "of all exits, which earlier runs did not record; "
        "*after 100 steps* is the validation accuracy then. *Processor time* has no value where a method and its twin "
        "ran on different machines.",
        "Where a run of a method stays at chance at the rate that its trials chose, all methods run at another one, "
        "too (`--also-rates`). Of several rates of a method, that of the best mean validation accuracy of its runs "
        "counts, which is bold; gaps are to that of back-propagation.",
    ]


def _seeds(there: Mapping[tuple[Form, int], int], plan: Plan) -> list[Row]:
    """Returns one row per texts and what trains: for each method, the number of seeds that have run with each K."""
    lines: dict[tuple[str, str], Row] = {}
    for form in plan.forms():
        data, method, adapt = form
        line = lines.setdefault((data, adapt), {"texts": data, "trains": adapt})
        line[method] = ", ".join(str(there.get((form, depth), 0)) for depth in plan.depths(form))
    return list(lines.values())


def _wrapped(*texts: str, mark: str = "* ") -> str:
    indent = " " * len(mark)
    return "\n".join(textwrap.fill(text, 118, initial_indent=mark, subsequent_indent=indent) for text in texts)
