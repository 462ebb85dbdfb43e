"""What the study of language models found, as JSON, tables in Markdown, a picture, and a page."""

from __future__ import annotations

import math
import os
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ds_al.figures.parts import Table
from ds_al.studies.figures import draw_perplexity
from ds_al.studies.language.plan import Form, Plan, choose
from ds_al.studies.language.training import TWIN
from ds_al.studies.results import header, machine_and_versions, write
from ds_al.studies.runs import Result
from ds_al.studies.tables import language as tables
from ds_al.studies.tables.write import document

Row = dict[str, Any]

BUDGETS = {"tokens": "equal tokens", "operations": "equal operations"}


def rows(results: Iterable[Result], plan: Plan) -> list[Row]:
    """A row per budget and form: test perplexity of each exit, and the gap to the twin seed by seed.

    Only runs of the chosen settings with the plan's number of steps count; a row says how many seeds it has, and
    which failed.
    """
    results = list(results)
    chosen = choose(results, plan)
    # A failed run has no settings of its own beside its name, which holds them all.
    good = [r for r in results if "failure" not in r and r["budget"] != "trial"]
    twin = {r["seed"]: _perplexity(r)[-1] for r in good if r["method"] == TWIN and _counts(r, chosen, plan)}
    table = []
    for budget in BUDGETS:
        for method, layers in plan.forms():
            own = [
                r
                for r in good
                if (r["budget"], r["method"], r["layers"]) == (budget, method, layers) and _counts(r, chosen, plan)
            ]
            if own:
                table.append(_row(own, twin))
    return table


def _counts(result: Result, chosen: dict[Form, Result], plan: Plan) -> bool:
    trial = chosen.get((result["method"], result["layers"]))
    if trial is None or result["seed"] >= plan.seeds:
        return False
    steps = plan.steps
    if result["budget"] == "operations":
        steps = round(steps * chosen[TWIN, 1]["operations_per_token"] / trial["operations_per_token"])
    return (result["steps"], result["lr"], result["bridge_blocks"]) == (steps, trial["lr"], trial["bridge_blocks"])


def _row(own: Sequence[Result], twin: dict[int, float]) -> Row:
    exits = [[*column] for column in zip(*(_perplexity(r) for r in own), strict=True)]
    gaps = [(_perplexity(r)[-1], twin[r["seed"]]) for r in own if r["seed"] in twin]
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
    }


def _perplexity(result: Result) -> list[float]:
    return [math.exp(loss) for loss in result["test_loss"]]


def write_tables(results: Sequence[Result], plan: Plan, *, json_path: Path, page: Path | None) -> str:
    """Writes JSON and CSV, the figure, and the page; returns the tables."""
    table = rows(results, plan)
    about = header(seeds=plan.seeds, steps=plan.steps, trial_steps=plan.trial_steps)
    picture = json_path.with_suffix(".png")
    if table:
        flat = [{**row, "exits": " ".join(f"{value:.2f}" for value in row["exits"])} for row in table]
        write(json_path, kind="perplexity", header=about, rows=flat)
        draw_perplexity(table, picture)
    if page is not None:
        page.write_text(whole_page(results, table, plan, about, picture=picture, page=page))
    return document(*found(results, table, plan))


def found(results: Sequence[Result], table: Sequence[Row], plan: Plan) -> list[Table | str]:
    """The tables: perplexity, trials, failures."""
    blocks: list[Table | str] = []
    for budget, title in BUDGETS.items():
        if own := [row for row in table if row["budget"] == budget]:
            blocks += [f"### At {title}", tables.perplexity(own)]
    failures = [f"* `{r['key']}`: {r['failure']}" for r in results if "failure" in r]
    blocks += ["### Trials", tables.trials(_trials(results, plan))]
    return [*blocks, "### Failures", "\n".join(failures) or "None."]


def _trials(results: Sequence[Result], plan: Plan) -> list[Row]:
    known, chosen = {r["key"]: r for r in results}, choose(results, plan)
    lines: list[Row] = []
    for method, layers in plan.forms():
        tried = []
        for run in plan.trials():
            if (run.method, run.layers) != (method, layers):
                continue
            settings = f"lr {run.lr:g}" + (f", H {run.bridge_blocks}" if method != TWIN else "")
            tried.append(f"{settings}: {_outcome(known.get(run.key))}")
        best = chosen.get((method, layers))
        what = "" if best is None else f"lr {best['lr']:g}, H {best['bridge_blocks']}"
        k = "" if method == TWIN else layers
        lines.append({"method": method, "K": k, "tried": "; ".join(tried), "chosen": what})
    return lines


def _outcome(result: Result | None) -> str:
    if result is None:
        return "not run"
    return "failed" if "failure" in result else f"{math.exp(result['validation_loss'][-1]):.1f}"


def whole_page(
    results: Sequence[Result], table: Sequence[Row], plan: Plan, about: Row, *, picture: Path, page: Path
) -> str:
    """The page: what was run, tables, published figures, what is missing."""
    made = "python run/perplexity.py --seeds 3 --json docs/results/perplexity.json --page docs/language_models.md"
    blocks: list[Table | str] = [
        "# Language models: perplexity beside the backprop twin",
        _wrapped(
            f"Made by `{made}`, {machine_and_versions(about)} The page [objectives.md](objectives.md) says "
            "what the methods are.",
            mark="",
        ),
        _wrapped(*_about_network(results), *_about_runs(plan)),
        "## Results",
        *found(results, table, plan),
    ]
    if table:
        blocks.append(f"![perplexity by method and exit]({os.path.relpath(picture, page.parent)})")
    if missing := _missing(table, plan):
        blocks += ["### Not run yet", "\n".join(missing)]
    return document(*blocks, "## Published", _wrapped(PUBLISHED, mark=""), tables.published())


def _about_network(results: Sequence[Result]) -> list[str]:
    whole = next((r for r in results if "sizes" in r), None)
    if whole is None:
        return []
    sizes = whole["sizes"]
    return [
        f"A GPT-2 of {sizes['blocks']} blocks of width {sizes['width']} with {sizes['heads']} heads, T = "
        f"{sizes['length']}, no dropout, embedding and head not tied; reviews of IMDB, in a byte-level BPE of "
        f"{whole['vocabulary']:,} tokens that is trained on the training texts. Perplexity is per token of that BPE.",
        f"A step is {sizes['batch']} pieces of {sizes['length']} tokens. AdamW, warm-up over a tenth of the steps, "
        "then a cosine to a tenth of the learning rate. The twin is the same network, from the same weights, on "
        "the same pieces in the same order.",
    ]


def _about_runs(plan: Plan) -> list[str]:
    return [
        f"Learning rate and bridge blocks (H) were chosen on validation texts by trials of {plan.trial_steps} "
        "steps: four for each method and K, four for the twin. Test texts were scored by the runs of the tables "
        "alone.",
        "Perplexities are means over seeds, with one standard deviation. Gap and ratio compare the last exit with "
        "the twin of the same seed.",
        "*Equal operations*: as many steps as the twin's operations pay for. Operations are the matrix products of "
        "a training step, forward and backward, as torch counts them. So it is time on one process, without what a "
        "pipeline gains.",
        f"{plan.steps:,} steps are few: these networks are far from their best, depth may not pay yet (a first "
        "exit then scores as well as the last), and the gap after a long training may be another one.",
    ]


PUBLISHED = (
    "WikiText perplexity of models pretrained by local learning in K parts, on 15 billion tokens: Yin et al., "
    "SOLO, arXiv 2609.35440, 2026; the figures come by way of notes on that paper. Sizes, data and tokens are "
    "others than above: what can be compared is the ratio."
)


def _missing(table: Sequence[Row], plan: Plan) -> list[str]:
    there = {(row["budget"], row["method"], row["K"]): row["seeds"] for row in table}
    return [
        f"* {title}: `{method}`{'' if method == TWIN else f', K = {layers}'}: {there.get((budget, method, layers), 0)} "
        f"of {plan.seeds} seeds"
        for budget, title in BUDGETS.items()
        for method, layers in plan.forms()
        if there.get((budget, method, layers), 0) < plan.seeds and not (budget == "operations" and method == TWIN)
    ]


def _wrapped(*texts: str, mark: str = "* ") -> str:
    """Points of a list, in lines of a page."""
    indent = " " * len(mark)
    return "\n".join(textwrap.fill(text, 118, initial_indent=mark, subsequent_indent=indent) for text in texts)
