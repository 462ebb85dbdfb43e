"""Builds the sections of results over a whole run: methods, curves, accuracy against time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ds_al.figures.parts import NOT_RECORDED, Chart, Section, Series, Table, charts_or
from ds_al.report import texts
from ds_al.report.cells import Cell, Statistic, statistic, styled
from ds_al.report.read import RunRecord, number, numbers

_POINTS = 240  # maximum points of a curve over batches; more are indistinguishable on a screen


def methods(cells: Sequence[Cell], *, comparable: bool = True) -> Section:
    """Builds the table of methods, its summary, and the table of times to given accuracies.

    Args:
        cells: one cell per row.
        comparable: whether only the method differs; otherwise the summary contains a warning.
    """
    columns: dict[str, list[str]] = {
        "stages": [texts.plain(cell.first.value("stages")) for cell in cells],
        "layers": [texts.plain(cell.first.layers) for cell in cells],
        "micro-batches": [texts.plain(cell.first.value("micro_batches")) for cell in cells],
        "seeds": [_seeds(cell) for cell in cells],
        "test accuracy, last epoch": [texts.with_sd(cell.over_seeds(accuracy), 4) for cell in cells],
        "best validation accuracy": [
            texts.with_sd(cell.over_seeds(_fact("best_validation_accuracy")), 4) for cell in cells
        ],
        "epoch of it": [texts.with_sd(cell.over_seeds(_fact("best_epoch")), 1) for cell in cells],
        "training seconds": [texts.with_sd(cell.over_seeds(lambda run: run.training_seconds), 1) for cell in cells],
        "samples/s": [texts.with_sd(cell.over_seeds(_samples_per_second), 0) for cell in cells],
        "parameters": [texts.fixed(cell.over_seeds(_total("parameters")).mean, 0) for cell in cells],
        "rho": [texts.plain(cell.first.value("rho")) for cell in cells],
        "FLOPs": [texts.si(_flops(cell)) for cell in cells],
    }
    without = [name for name, values in columns.items() if set(values) == {NOT_RECORDED}]
    shown = {name: values for name, values in columns.items() if name not in without}
    rows = [[cell.label, *(values[row] for values in shown.values())] for row, cell in enumerate(cells)]
    table = Table(
        "Methods: mean ± standard deviation over seeds", ["method", *shown], rows, frozenset(range(1, len(shown) + 1))
    )
    paragraphs = _answer(cells)
    if paragraphs and not comparable:
        paragraphs.append("More than the method differs between these runs (see above): read this with care.")
    if "rho" in shown:
        paragraphs.append("rho is the cost of a layer of associated learning over that of its plain block.")
    twins = [cell.first for cell in cells if cell.first.method.startswith("bp_")]
    if "FLOPs" in shown:
        paragraphs.append("FLOPs are those of training on one sample, forward and backward.")
    if emulated := [run.method for run in twins if run.is_emulated]:
        paragraphs.append(f"{emulated[0]} is emulated in one process: it has the accuracy of a pipeline, and no times.")
    if any(run.value("layers") is None and run.layers is not None for run in twins):
        paragraphs.append("The layers of a backprop twin include its classifier.")
    if without:
        paragraphs.append(f"Not recorded by these runs: {', '.join(without)}.")
    tables = [table, *_time_to(cells)]
    return Section("methods", "Methods", paragraphs=paragraphs, tables=tables, charts=_exits_chart(cells))


def _flops(cell: Cell) -> Any:
    """Returns FLOPs per sample of the network's parts that the cell's method runs, by name."""
    found = cell.first.value("flops")
    if not isinstance(found, dict):
        return found
    parts = {name: known for name, value in found.items() if (known := number(value)) is not None}
    twin = parts.pop("twin", None)
    return twin if cell.first.method.startswith("bp_") else sum(parts.values()) if parts else None


def curves(cells: Sequence[Cell]) -> Section:
    """Builds the losses of each cell, and the validation accuracy of all cells over epochs."""
    charts = [chart for chart in (_validation(cells, over="epoch"),) if chart]
    for index, cell in enumerate(cells, start=1):
        charts += [chart for chart in (_losses(cell, key=f"losses-{index}"),) if chart]
    return charts_or("curves", "Curves", charts, "No epochs were recorded.")


def accuracy_in_time(cells: Sequence[Cell]) -> Section:
    """Builds the chart of validation accuracy against seconds of training, with the final test accuracy."""
    chart = _validation(cells, over="seconds")
    return charts_or(
        "time", "Accuracy against time", [chart] if chart else [], "No validation accuracies were recorded."
    )


def accuracy(run: RunRecord) -> float | None:
    """Returns the test accuracy of the last exit after the last epoch."""
    return run.test_accuracy[-1] if run.test_accuracy else None


def _fact(key: str) -> Callable[[RunRecord], float | None]:
    return lambda run: number(run.value(key))


def _total(key: str) -> Callable[[RunRecord], float | None]:
    return lambda run: sum(found) if (found := numbers(run.value(key))) else None


def _samples_per_second(run: RunRecord) -> float | None:
    return None if run.is_emulated else number(run.value("samples_per_second"))


def _seeds(cell: Cell) -> str:
    unfinished = len(cell.runs) - len(cell.finished)
    return f"{len({run.seed for run in cell.finished})}" + (f" (+ {unfinished} unfinished)" if unfinished else "")


def _answer(cells: Sequence[Cell]) -> list[str]:
    """Names the best methods in accuracy and time, in one paragraph per model and data set with several cells."""
    timed = [(cell, cell.over_seeds(accuracy), cell.over_seeds(lambda run: run.training_seconds)) for cell in cells]
    known = [(cell, right, took) for cell, right, took in timed if right.mean is not None and took.mean is not None]
    data = {str(cell.first.data.get("name")) for cell, _, _ in known}
    if len(known) < 2 or len(data) > 1:
        return []
    most = max(known, key=lambda row: row[1].mean or 0.0)
    quickest = min(known, key=lambda row: row[2].mean or 0.0)
    lines = [
        f"Highest mean test accuracy after the last epoch: {most[0].label}, {texts.with_sd(most[1], 4)}. "
        f"Shortest training, all epochs: {quickest[0].label}, {texts.with_sd(quickest[2], 1)} s."
    ]
    close = [cell.label for cell, right, _ in known if cell is not most[0] and _overlap(right, most[1])]
    if close:
        lines.append(f"Within one standard deviation of the highest: {', '.join(close)}.")
    return lines


def _overlap(one: Statistic, other: Statistic) -> bool:
    if one.mean is None or other.mean is None:
        return False
    return abs(one.mean - other.mean) <= max(one.sd or 0.0, other.sd or 0.0)


def _time_to(cells: Sequence[Cell]) -> list[Table]:
    """Builds the table of seconds of training until a validation accuracy was first reached."""
    cells = [cell for cell in cells if not cell.first.is_emulated]
    ends = [max((value for _, _, value in run.validation()), default=None) for cell in cells for run in cell.shown]
    highest = max((end for end in ends if end is not None), default=None)
    if highest is None:
        return []
    goals = [goal / 100 for goal in (50, 60, 70, 75, 80, 85, 90, 92.5, 95, 97.5, 99) if goal / 100 <= highest][-4:]
    if not goals:
        return []
    rows = []
    for cell in cells:
        texts_of_goals = []
        for goal in goals:
            reached = [_first(run, goal) for run in cell.shown]
            one = statistic(reached)
            few = "" if one.n == len(reached) else f" ({one.n} of {len(reached)} runs)"
            texts_of_goals.append("not reached" if one.mean is None else texts.with_sd(one, 1, unit=" s") + few)
        rows.append([cell.label, *texts_of_goals])
    columns = ["method", *(f"{goal:.3g}" for goal in goals)]
    caption = "Seconds of training until this validation accuracy was first seen (looked at after epochs only)"
    return [Table(caption, columns, rows, frozenset(range(1, len(goals) + 1)))]


def _first(run: RunRecord, goal: float) -> float | None:
    return next((seconds for _, seconds, value in run.validation() if value >= goal), None)


def _exits(cells: Sequence[Cell]) -> dict[str, list[Statistic]]:
    found = {}
    for cell in cells:
        rows = [run.test_accuracy for run in cell.finished if len(run.test_accuracy) > 1]
        count = min(map(len, rows), default=0)
        if count:
            found[cell.label] = [statistic([row[number] for row in rows]) for number in range(count)]
    return found


def _exits_table(found: Mapping[str, Sequence[Statistic]]) -> Table:
    most = max(map(len, found.values()))
    rows = [
        [label, *(texts.with_sd(one, 4) for one in exits), *[""] * (most - len(exits))]
        for label, exits in found.items()
    ]
    columns = ["method", *(f"exit {number}" for number in range(1, most + 1))]
    return Table("Test accuracy at each exit, last epoch", columns, rows, frozenset(range(1, most + 1)))


def _exits_chart(cells: Sequence[Cell]) -> list[Chart]:
    found = _exits(cells)
    if not found:
        return []
    styles = {cell.label: style for style, cell in styled(cells)}
    series = [
        Series(
            name=label,
            x=list(range(1, len(exits) + 1)),
            y=[one.mean for one in exits],
            spread=[one.sd for one in exits],
            style=styles[label],
        )
        for label, exits in found.items()
    ]
    return [
        Chart(
            key="exits",
            title="Test accuracy at each exit",
            description="Each layer of associated learning can answer by itself: accuracy after the last epoch.",
            x_label="exit after layer",
            y_label="test accuracy",
            series=series,
            table=_exits_table(found),
        )
    ]


def _validation(cells: Sequence[Cell], *, over: str) -> Chart | None:
    series, rows = [], []
    for style, cell in styled(cells):
        if over == "seconds" and cell.first.is_emulated:
            continue
        by_epoch: dict[int, list[tuple[float, float]]] = {}
        for run in cell.shown:
            for epoch, seconds, value in run.validation():
                by_epoch.setdefault(epoch, []).append((seconds, value))
        if not by_epoch:
            continue
        label = cell.label if cell.finished else f"{cell.label} (unfinished)"
        times = {epoch: statistic([seconds for seconds, _ in found]) for epoch, found in sorted(by_epoch.items())}
        values = {epoch: statistic([value for _, value in found]) for epoch, found in sorted(by_epoch.items())}
        x = [times[epoch].mean or 0.0 if over == "seconds" else epoch for epoch in values]
        means, spread = [one.mean for one in values.values()], [one.sd for one in values.values()]
        series.append(Series(name=label, x=x, y=means, spread=spread, style=style))
        for epoch, one in values.items():
            took_until = NOT_RECORDED if cell.first.is_emulated else texts.with_sd(times[epoch], 1)
            rows.append([label, str(epoch), took_until, texts.with_sd(one, 4)])
        test, took = cell.over_seeds(accuracy), cell.over_seeds(lambda run: run.training_seconds)
        if over == "seconds" and test.mean is not None and took.mean is not None:
            series.append(
                Series(
                    name=f"{label}, test",
                    x=[took.mean],
                    y=[test.mean],
                    spread=[test.sd],
                    style=style,
                    look="mark",
                )
            )
    if not series:
        return None
    columns = ["method", "epoch", "seconds of training", "validation accuracy"]
    in_time = over == "seconds"
    return Chart(
        key="accuracy-in-time" if in_time else "validation",
        title="Accuracy against seconds of training" if in_time else "Validation accuracy",
        description="Validation accuracy of the last exit after each epoch, mean and standard deviation over seeds"
        + ("; evaluation is not in the time. A star is the test accuracy after the last epoch." if in_time else "."),
        x_label="seconds of training" if in_time else "epoch",
        y_label="accuracy" if in_time else "validation accuracy",
        series=series,
        table=Table("Validation accuracy, last exit", columns, rows, frozenset({1, 2, 3})),
    )


def _losses(cell: Cell, *, key: str) -> Chart | None:
    runs = [run for run in cell.shown if run.epochs]
    if not runs:
        return None
    series: list[Series] = []
    names, columns = _loss_columns(runs[0])
    by_epoch: dict[int, list[list[float | None]]] = {}
    for run in runs:
        for row in run.epochs:
            by_epoch.setdefault(row["epoch"], []).append([value_of(row) for value_of in columns])
    means = {
        epoch: [statistic([row[index] for row in rows]) for index in range(len(names))]
        for epoch, rows in sorted(by_epoch.items())
    }
    for index, name in enumerate(names):
        values = [row[index] for row in means.values()]
        series.append(
            Series(
                name=name,
                x=list(means),
                y=[one.mean for one in values],
                spread=[one.sd for one in values],
                style=index // 2,
                dashed=bool(index % 2),
            )
        )
    in_batches = _by_batch(runs[0])
    series += in_batches
    rows = [[str(epoch), *(texts.with_sd(one, 4) for one in row)] for epoch, row in means.items()]
    over_runs = f" and over {len(runs)} runs, with the standard deviation over runs" if len(runs) > 1 else ""
    thin = f" Thin lines: associated loss of batches, seed {texts.plain(runs[0].seed)}." if in_batches else ""
    return Chart(
        key=key,
        title=f"Losses: {cell.label}",
        description=f"Mean loss of each epoch over the layers of a stage{over_runs}.{thin}",
        x_label="epoch",
        y_label="loss",
        series=series,
        table=Table(f"Losses by epoch: {cell.label}", ["epoch", *names], rows, frozenset(range(len(names) + 1))),
        log_y=True,
    )


def _bounds(run: RunRecord) -> list[tuple[int, int]]:
    partition = run.facts.get("partition") or []
    return [(a, b) for a, b in zip(partition, partition[1:], strict=False) if b > a]


def _loss_columns(run: RunRecord) -> tuple[list[str], list[Callable[[dict[str, Any]], float | None]]]:
    if "associated_loss" not in run.epochs[0]:
        return ["loss"], [lambda row: number(row.get("loss"))]
    names: list[str] = []
    columns: list[Callable[[dict[str, Any]], float | None]] = []
    for stage, (start, stop) in enumerate(_bounds(run)):
        for key in ("associated_loss", "autoencoder_loss"):
            names.append(f"stage {stage}, {key.split('_')[0]}")
            columns.append(lambda row, k=key, a=start, b=stop: statistic(numbers(row.get(k))[a:b]).mean)  # type: ignore[misc]
    return names, columns


def _by_batch(run: RunRecord) -> list[Series]:
    """Returns the associated loss of each stage over batches, averaged over neighbours if there are many."""
    epochs = [number(row.get("epoch")) or 1.0 for row in run.batches]
    begin = min(epochs, default=1.0) - 1  # a resumed run starts later
    per_epoch = max(epochs.count(begin + 1), 1)
    block = -(-len(run.batches) // _POINTS)
    series = []
    for stage, (start, stop) in enumerate(_bounds(run)):
        x: list[float | str] = []
        y: list[float | None] = []
        for first in range(0, len(run.batches), block or 1):
            rows = run.batches[first : first + block]
            losses = [number(layer[0]) for row in rows for layer in (row.get("losses") or [])[start:stop] if layer]
            x.append(round(begin + (first + len(rows)) / per_epoch, 4))
            y.append(statistic(losses).mean)
        if any(value is not None for value in y):
            series.append(Series(name=f"stage {stage}, batches", x=x, y=y, style=stage, look="thin"))
    return series
