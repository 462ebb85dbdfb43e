"""Writes the results of the language model study: JSON, Markdown tables, a figure, and a page."""

from __future__ import annotations

import math
import os
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ds_al.figures.parts import Table
from ds_al.studies.language.picture import draw_perplexity
from ds_al.studies.language.plan import (
    BUDGETS,
    SAMPLED_ALL,
    TWIN_SAMPLED,
    Plan,
    choose,
    choose_longer,
    longer_trials,
    steps_of,
)
from ds_al.studies.language.speed import speed_of
from ds_al.studies.language.training import TWIN
from ds_al.studies.results import header, machine_and_versions, read, write
from ds_al.studies.runs import Result
from ds_al.studies.tables import language as tables
from ds_al.studies.tables.write import document

Row = dict[str, Any]


def rows(results: Iterable[Result], plan: Plan) -> list[Row]:
    """Returns one row per budget and form: test perplexity at each exit, beside the twin of the same seed and beside
    the twin with a sampled softmax, the strongest rival.

    Only runs with the chosen settings and the plan's number of steps are included. ``seeds`` counts the runs of a row.
    """
    results = list(results)
    chosen, longer = choose(results, plan), choose_longer(results, plan)
    settings = {"tokens": chosen, "operations": chosen, "longer": longer}
    # A failed run only records its key, which encodes its settings.
    good = [r for r in results if "failure" not in r and r["budget"] != "trial"]

    def counts(result: Result) -> bool:
        trial = settings[result["budget"]].get((result["method"], result["layers"]))
        if trial is None or result["seed"] >= plan.seeds:
            return False
        steps = steps_of(result["budget"], trial, chosen, plan)
        return (result["steps"], result["lr"], result["bridge_blocks"]) == (steps, trial["lr"], trial["bridge_blocks"])

    def last_exits(method: str, budget: str) -> dict[int, float]:
        own = [r for r in good if (r["method"], r["budget"]) == (method, budget) and counts(r)]
        return {r["seed"]: _perplexity(r)[-1] for r in own}

    table = []
    for budget in BUDGETS:
        twin = last_exits(TWIN, "longer" if budget == "longer" else "tokens")
        rival = last_exits(TWIN_SAMPLED.name, budget)
        for method, layers in plan.forms():
            own = [r for r in good if (r["budget"], r["method"], r["layers"]) == (budget, method, layers) and counts(r)]
            if own:
                table.append(_row(own, twin, rival))
    return table


def _row(own: Sequence[Result], twin: dict[int, float], rival: dict[int, float]) -> Row:
    exits = [[*column] for column in zip(*(_perplexity(r) for r in own), strict=True)]
    gaps, beside = (
        [(_perplexity(r)[-1], other[r["seed"]]) for r in own if r["seed"] in other] for other in (twin, rival)
    )
    first = own[0]
    return {
        "budget": first["budget"],
        "method": first["method"],
        "K": first["layers"],
        "seeds": len(own),
        "lr": first["lr"],
        "bridge_blocks": first["bridge_blocks"],
        "tokens": first["tokens"],
        "operations_per_token": first["operations_per_token"],
        "training_seconds": statistics.mean(r["training_seconds"] for r in own),
        "perplexity": statistics.mean(exits[-1]),
        "perplexity_sd": statistics.stdev(exits[-1]) if len(own) > 1 else None,
        "exits": [statistics.mean(column) for column in exits],
        "gap": statistics.mean(ours - theirs for ours, theirs in gaps) if gaps else None,
        "gap_sd": statistics.stdev(ours - theirs for ours, theirs in gaps) if len(gaps) > 1 else None,
        "ratio": statistics.mean(ours / theirs for ours, theirs in gaps) if gaps else None,
        "ratio_sampled": statistics.mean(ours / theirs for ours, theirs in beside) if beside else None,
    }


def _perplexity(result: Result) -> list[float]:
    return [math.exp(loss) for loss in result["test_loss"]]


def write_tables(results: Sequence[Result], plan: Plan, *, json_path: Path, page: Path | None) -> str:
    """Writes JSON and CSV, the figure, and the page; returns the tables in Markdown."""
    table = rows(results, plan)
    about = header(runs=results, seeds=plan.seeds, steps=plan.steps, trial_steps=plan.trial_steps)
    picture = json_path.with_suffix(".png")
    if table:
        flat = [{**row, "exits": " ".join(f"{value:.2f}" for value in row["exits"])} for row in table]
        write(json_path, kind="perplexity", header=about, rows=flat)
        draw_perplexity(table, picture)
    if page is not None:
        measured = speed_of(json_path)
        page.write_text(whole_page(results, table, plan, about, picture=picture, page=page, speed=measured))
    return document(*found(results, table, plan))


def found(results: Sequence[Result], table: Sequence[Row], plan: Plan) -> list[Table | str]:
    """Returns the tables with their headings: perplexity, trials, failures."""
    blocks: list[Table | str] = []
    for budget in BUDGETS:
        if own := [row for row in table if row["budget"] == budget]:
            blocks += [f"### At {tables.TITLES[budget]}", tables.perplexity(own)]
    failures = [f"* `{r['key']}`: {r['failure']}" for r in results if "failure" in r]
    blocks += ["### Trials", tables.trials(_trials(results, plan))]
    return [*blocks, "### Failures", "\n".join(failures) or "None."]


def _trials(results: Sequence[Result], plan: Plan) -> list[Row]:
    known, chosen, longer = {r["key"]: r for r in results}, choose(results, plan), choose_longer(results, plan)
    lines: list[Row] = []
    for method, layers in plan.forms():
        tried = []
        for run in plan.trials():
            if (run.method, run.layers) != (method, layers):
                continue
            settings = f"lr {run.lr:g}" + (f", H {run.bridge_blocks}" if method != TWIN else "")
            tried.append(f"{settings}: {_outcome(known.get(run.key))}")
        best, best_longer = chosen.get((method, layers)), longer.get((method, layers))
        what = "" if best is None else f"lr {best['lr']:g}, H {best['bridge_blocks']}"
        if best is not None and best_longer is not None:
            runs = longer_trials(best, chosen, plan)
            tried += [f"longer, lr {run.lr:g}: {_outcome(known.get(run.key))}" for run in runs]
            what += f"; longer: lr {best_longer['lr']:g}"
        k = "" if method == TWIN else layers
        lines.append({"method": method, "K": k, "tried": "; ".join(tried), "chosen": what})
    return lines


def _outcome(result: Result | None) -> str:
    if result is None:
        return "not run"
    return "failed" if "failure" in result else f"{math.exp(result['validation_loss'][-1]):.1f}"


def whole_page(
    results: Sequence[Result], table: Sequence[Row], plan: Plan, about: Row, *, picture: Path, page: Path, speed: Path
) -> str:
    """Returns the page: settings, tables, time, published figures, and the runs that are missing."""
    made = "python run/perplexity.py --seeds 3 --json docs/results/perplexity.json --page docs/language_models.md"
    blocks: list[Table | str] = [
        "# Language models: perplexity compared with the backprop twin",
        _wrapped(
            f"Generated by `{made}`, {machine_and_versions(about)} [objectives.md](objectives.md) defines the methods.",
            mark="",
        ),
        *_verdict(table, plan),
        _wrapped(*_about_network(results), *_about_runs(plan)),
        "## Results",
        *found(results, table, plan),
    ]
    if table:
        blocks.append(f"![perplexity by method and exit]({os.path.relpath(picture, page.parent)})")
    if missing := _missing(table, plan):
        blocks += ["### Not run yet", "\n".join(missing)]
    blocks += ["## Time of a step", *_speed(speed)]
    return document(*blocks, "## Published", _wrapped(PUBLISHED, mark=""), tables.published())


def _verdict(table: Sequence[Row], plan: Plan) -> list[str]:
    """Compares the method of the longer runs with both twins, where all seeds have run."""
    said = []
    for budget, steps in (("operations", plan.steps), ("longer", plan.steps * plan.longer)):
        whole = [row for row in table if row["budget"] == budget and row["seeds"] == plan.seeds]
        own = [row for row in whole if row["method"] == SAMPLED_ALL.name and row["ratio"] and row["ratio_sampled"]]
        if own:
            depths = " and ".join(str(row["K"]) for row in own)
            twin, rival = (" and ".join(f"{row[name]:.2f}" for row in own) for name in ("ratio", "ratio_sampled"))
            said.append(
                f"After the operations of {steps:,} steps of back-propagation, `{SAMPLED_ALL.name}` in K = {depths} "
                f"layers has {twin} times its perplexity, and {rival} times that of back-propagation with the same "
                "loss."
            )
    return [_wrapped(*(f"**{text}**" for text in said))] if said else []


def _about_network(results: Sequence[Result]) -> list[str]:
    whole = next((r for r in results if "sizes" in r), None)
    if whole is None:
        return []
    sizes = whole["sizes"]
    return [
        f"A GPT-2 of {sizes['blocks']} blocks of width {sizes['width']} with {sizes['heads']} heads, T = "
        f"{sizes['length']}, no dropout, untied embedding and head. The data are IMDB reviews, tokenized by a "
        f"byte-level BPE of {whole['vocabulary']:,} tokens trained on the training texts; perplexity is per BPE token.",
        f"Each step trains on {sizes['batch']} sequences of {sizes['length']} tokens. The optimizer is AdamW with "
        "warm-up over a tenth of the steps, then cosine decay to a tenth of the learning rate. The twin is the same "
        "network with the same initial weights, trained on the same sequences in the same order.",
    ]


def _about_runs(plan: Plan) -> list[str]:
    return [
        f"Learning rate and number of bridge blocks (H) were chosen on validation texts by four trials of "
        f"{plan.trial_steps} steps for each method and K; the learning rate of the twins by five of {plan.steps:,} "
        "steps, in their favour. Where all seeds have run with several rates, the one with the better mean on "
        "validation texts counts. Only the runs in the result tables were evaluated on the test texts.",
        "`bare` is `next_token` without private blocks, and so with fewer operations. In `quarter` layers before the "
        "last also learn from a quarter of the tokens, drawn anew at each step; in `light` their heads also read codes "
        "of width 32. In `sampled` (`vocabulary_share` 0.25) the softmax of layers before the last is over a quarter "
        "of the vocabulary, in `sampled_all` (`last_layer`) that of the last one, too. All of these were tried with "
        "rates up to 0.004 instead of the private block, so that they differ from `next_token` in both; the trials "
        "are below, those of the twins up to the same rate.",
        "`backprop_sampled` is the twin with that loss, at equal operations the strongest rival: `sampled_all` has the "
        "same loss in all layers.",
        "Perplexities are means over seeds ± one standard deviation, over the whole vocabulary. Gap and ratio compare "
        "the last exit with the twin of the same seed, the last ratio with `backprop_sampled` at the same budget.",
        "*Equal operations*: the number of steps is chosen so that training takes as many operations as the twin's. "
        "Operations are the matrix products of a training step, forward and backward, as counted by torch. This "
        "budget corresponds to time on one process, without the speed-up of a pipeline, as far as time follows "
        "operations ([below](#time-of-a-step)).",
        f"The longer runs have {plan.longer} times the steps, and no text twice. Each method has its learning rate, "
        f"among {', '.join(f'{lr:g}' for lr in plan.longer_rates)}, chosen on validation texts by such runs of seed 0.",
        f"{plan.steps:,} steps are few: the networks are far from converged, and depth does not help yet where the "
        "first exit is as good as the last. The longer runs show how the gaps change.",
    ]


def _speed(path: Path) -> list[Table | str]:
    if not path.exists():
        return ["Not measured yet: `python run/perplexity.py --speed --json docs/results/perplexity.json`"]
    measured = read(path)
    text = (
        "A training step of each method, all layers in one process, in turns with one of back-propagation. Operations "
        "leave out the optimizer, the draw of a part of the vocabulary, and the start of small kernels."
    )
    rows = measured.rows
    most = max(rows, key=lambda row: row["times_as_long"] / row["times_operations"])
    text += (
        f" Where they leave out most, `{most['method']}` with K = {most['K']}, a step takes "
        f"{most['times_as_long'] / most['times_operations']:.2f} times as long as its operations suggest."
    )
    made = _wrapped(f"`{measured.header['command']}`, {machine_and_versions(measured.header)}", mark="")
    return [_wrapped(text, mark=""), tables.speed(rows), made]


PUBLISHED = (
    "WikiText perplexity of models pretrained by local learning in K parts on 15 billion tokens: Yin et al., SOLO, "
    "arXiv 2609.35440, 2026; the figures were taken from notes on that paper. Model sizes, data and token counts "
    "differ from those above, so only the ratios are comparable."
)


def _missing(table: Sequence[Row], plan: Plan) -> list[str]:
    there = {(row["budget"], row["method"], row["K"]): row["seeds"] for row in table}
    return [
        f"* {tables.TITLES[budget]}: `{method}`{'' if method == TWIN else f', K = {layers}'}: "
        f"{there.get((budget, method, layers), 0)} of {plan.seeds} seeds"
        for budget in BUDGETS
        for method, layers in plan.forms()
        if plan.runs(method, budget) and there.get((budget, method, layers), 0) < plan.seeds
    ]


def _wrapped(*texts: str, mark: str = "* ") -> str:
    """Wraps each text as a list item."""
    indent = " " * len(mark)
    return "\n".join(textwrap.fill(text, 118, initial_indent=mark, subsequent_indent=indent) for text in texts)
