"""What the study of language models found, as JSON, tables in Markdown, a picture, and a page."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ds_al.studies.bench import report
from ds_al.studies.language.cell import TWIN
from ds_al.studies.language.plan import Form, Plan, Result, choose

Row = dict[str, Any]

ANCHORS = (
    (2, "340M", 29.05, 28.04),
    (4, "340M", 31.19, 28.04),
    (2, "1.3B", 22.29, 21.61),
    (4, "1.3B", 23.59, 21.61),
    (2, "2B", 21.57, 20.93),
    (4, "2B", 22.21, 20.93),
)
"""K, parameters, WikiText perplexity by local learning and by backprop: Yin et al., "SOLO", arXiv 2609.35440, 2026."""

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
    """Writes JSON and CSV, the picture, and the page; returns the tables."""
    table = rows(results, plan)
    header = report.header(seeds=plan.seeds, steps=plan.steps, trial_steps=plan.trial_steps)
    text = markdown(results, table, plan)
    if table:
        flat = [{**row, "exits": " ".join(f"{value:.2f}" for value in row["exits"])} for row in table]
        report.write(json_path, header=header, rows=flat)
        draw(table, json_path.with_suffix(".png"))
    if page is not None:
        picture = json_path.with_suffix(".png")
        page.write_text(whole_page(results, table, plan, text, header, picture=picture, page=page))
    return text


def markdown(results: Sequence[Result], table: Sequence[Row], plan: Plan) -> str:
    """The tables: perplexity, trials, failures."""
    parts = []
    for budget, title in BUDGETS.items():
        own = [row for row in table if row["budget"] == budget]
        if not own:
            continue
        parts += [f"### At {title}", "", *_table(own), ""]
    chosen = choose(results, plan)
    parts += ["### Trials", "", *_trials(results, chosen, plan), ""]
    failures = [f"* `{r['key']}`: {r['failure']}" for r in results if "failure" in r]
    parts += ["### Failures", "", *(failures or ["None."])]
    return "\n".join(parts) + "\n"


def _table(own: Sequence[Row]) -> list[str]:
    lines = [
        "| method | K | H | lr | seeds | tokens | operations per token | perplexity | gap | ratio | at each exit |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in own:
        k = "" if row["method"] == TWIN else row["K"]
        exits = "" if row["method"] == TWIN else ", ".join(f"{value:.1f}" for value in row["exits"])
        same = row["method"] == TWIN or row["gap"] is None
        gap = "" if same else _spread(row["gap"], row["gap_sd"], sign="+")
        ratio = "" if same else f"{row['ratio']:.3f}"
        lines.append(
            f"| `{row['method']}` | {k} | {row['bridge_blocks']} | {row['lr']:g} | {row['seeds']} | "
            f"{row['tokens']:,} | {row['operations_per_token'] / 1e6:.2f} M | "
            f"{_spread(row['perplexity'], row['perplexity_sd'])} | {gap} | {ratio} | {exits} |"
        )
    return lines


def _spread(mean: float, sd: float | None, *, sign: str = "") -> str:
    return f"{mean:{sign}.2f}" + ("" if sd is None else f" ± {sd:.2f}")


def _trials(results: Sequence[Result], chosen: dict[Form, Result], plan: Plan) -> list[str]:
    found = {r["key"]: r for r in results}
    lines = ["| method | K | validation perplexity of each trial | chosen |", "|---|---|---|---|"]
    for method, layers in plan.forms():
        own = [cell for cell in plan.trials() if (cell.method, cell.layers) == (method, layers)]
        said = []
        for cell in own:
            result = found.get(cell.key)
            value = "not run" if result is None else "failed" if "failure" in result else None
            value = value or f"{math.exp(result['validation_loss'][-1]):.1f}"  # type: ignore[index]
            said.append(f"lr {cell.lr:g}" + (f", H {cell.bridge_blocks}" if method != TWIN else "") + f": {value}")
        best = chosen.get((method, layers))
        what = "" if best is None else f"lr {best['lr']:g}, H {best['bridge_blocks']}"
        lines.append(f"| `{method}` | {'' if method == TWIN else layers} | {'; '.join(said)} | {what} |")
    return lines


def whole_page(
    results: Sequence[Result], table: Sequence[Row], plan: Plan, text: str, header: Row, *, picture: Path, page: Path
) -> str:
    """The page: what was run, tables, published figures, what is missing."""
    sizes = next((r["sizes"] for r in results if "sizes" in r), None)
    vocabulary = next((r["vocabulary"] for r in results if "vocabulary" in r), None)
    made = "python run/perplexity.py --seeds 3 --json docs/results/perplexity.json --page docs/language_models.md"
    lines = [
        "# Language models: perplexity beside the backprop twin",
        "",
        *_wrapped(
            f"Made by `{made}`, {report.machine_and_versions(header)} The page [objectives.md](objectives.md) says "
            "what the methods are.",
            mark="",
        ),
        "",
    ]
    if sizes is not None:
        lines += _wrapped(
            f"A GPT-2 of {sizes['blocks']} blocks of width {sizes['width']} with {sizes['heads']} heads, T = "
            f"{sizes['length']}, no dropout, embedding and head not tied; reviews of IMDB, in a byte-level BPE of "
            f"{vocabulary:,} tokens that is trained on the training texts. Perplexity is per token of that BPE.",
            f"A step is {sizes['batch']} pieces of {sizes['length']} tokens. AdamW, warm-up over a tenth of the steps, "
            "then a cosine to a tenth of the learning rate. The twin is the same network, from the same weights, on "
            "the same pieces in the same order.",
        )
    lines += [
        *_wrapped(
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
        ),
        "",
        "## Results",
        "",
        text,
    ]
    if table:
        lines += [f"![perplexity by method and exit]({_relative(picture, page)})", ""]
    missing = _missing(table, plan)
    if missing:
        lines += ["### Not run yet", "", *missing, ""]
    lines += ["## Published", "", *_anchors(), ""]
    return "\n".join(lines)


def _missing(table: Sequence[Row], plan: Plan) -> list[str]:
    there = {(row["budget"], row["method"], row["K"]): row["seeds"] for row in table}
    return [
        f"* {title}: `{method}`{'' if method == TWIN else f', K = {layers}'}: {there.get((budget, method, layers), 0)} "
        f"of {plan.seeds} seeds"
        for budget, title in BUDGETS.items()
        for method, layers in plan.forms()
        if there.get((budget, method, layers), 0) < plan.seeds and not (budget == "operations" and method == TWIN)
    ]


def _anchors() -> list[str]:
    return [
        *_wrapped(
            "WikiText perplexity of models pretrained by local learning in K parts, on 15 billion tokens: Yin et al., "
            "SOLO, arXiv 2609.35440, 2026; the figures come by way of notes on that paper. Sizes, data and tokens are "
            "others than above: what can be compared is the ratio.",
            mark="",
        ),
        "",
        "| parameters | K | local | backprop | gap | ratio |",
        "|---|---|---|---|---|---|",
        *(
            f"| {size} | {layers} | {local:.2f} | {backprop:.2f} | {local - backprop:+.2f} | {local / backprop:.3f} |"
            for layers, size, local, backprop in ANCHORS
        ),
    ]


def _wrapped(*texts: str, mark: str = "* ") -> list[str]:
    """Points of a list, in lines of a page."""
    return [
        line
        for text in texts
        for line in textwrap.wrap(text, 118, initial_indent=mark, subsequent_indent=" " * len(mark))
    ]


def _relative(picture: Path, page: Path) -> str:
    return str(Path(*[".."] * len(page.parent.parts), picture)) if not picture.is_absolute() else str(picture)


def draw(table: Sequence[Row], path: Path) -> None:
    """Perplexity of each exit at equal tokens, beside the twin's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global state
    from matplotlib.figure import Figure

    own = [row for row in table if row["budget"] == "tokens"]
    twin = next((row["perplexity"] for row in own if row["method"] == TWIN), None)
    depths = sorted({row["K"] for row in own if row["method"] != TWIN}) or [1]
    figure = Figure(figsize=(4.5 * len(depths), 4), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    for axes, layers in zip(figure.subplots(1, len(depths), squeeze=False, sharey=True).flat, depths, strict=True):
        for row, marker in zip([r for r in own if r["K"] == layers and r["method"] != TWIN], "os^D", strict=False):
            axes.plot(range(1, layers + 1), row["exits"], marker=marker, label=row["method"])
        if twin is not None:
            axes.axhline(twin, color="black", linestyle="--", label=TWIN)
        axes.set(
            title=f"K = {layers}", xlabel="exit after layer", ylabel="test perplexity", xticks=range(1, layers + 1)
        )
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
