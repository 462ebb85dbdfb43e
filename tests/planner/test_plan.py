"""The planner: its predictions are the formulas where there are any, and what was measured where it was."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from matplotlib.figure import Figure

from ds_al.errors import ALConfigError
from ds_al.planner import (
    COMPARED,
    METHODS,
    Jitter,
    Layer,
    Link,
    Machines,
    Work,
    advice,
    break_even,
    grid,
    predict,
)
from ds_al.planner.network import PlannedNetwork, saved_bytes
from ds_al.planner.show import draw
from ds_al.studies.bench.predictions import against
from ds_al.studies.tables.scaling import planner
from ds_al.studies.tables.write import document

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"
WORK = Work(forward=4.0, backward=8.0)


@pytest.mark.parametrize(
    ("method", "seconds"),
    [
        ("streaming", 8 * 3.0),
        ("forward_first", 8 * 3.0 + 3 * 1.0),
        ("bp_1f1b", (8 + 3) * 3.0),
        ("bp_gpipe", (8 + 3) * 3.0),
        ("bp_naive", 8 * 12.0),
        ("parallel_backward", 8 * (4 * 1.0 + 2.0)),
        ("sequential", 8 * 12.0),
        ("bp_interleaved", (8 + 1.5) * 3.0),
        ("bp_zb_h1", 8 * 3.0 + 3 * 1.0),
        ("bp_zb_h2", 8 * 3.0),
        ("bp_dualpipev", 8 * 3.0 + 3 * (0.5 + 2.0) - 0.5),
        ("bp_async", 8 * 3.0),
        ("bp_dp", 2 * 12.0),
    ],
)
def test_a_batch_takes_what_the_formula_says(method: str, seconds: float) -> None:
    assert predict(method, WORK, stages=4, micro_batches=8).seconds == pytest.approx(seconds)


def test_rho_and_steps_are_what_streaming_pays() -> None:
    plain = predict("streaming", WORK, stages=4, micro_batches=8)
    heavy = predict("streaming", Work(4.0, 8.0, step=0.4, rho=1.25), stages=4, micro_batches=8)
    assert heavy.seconds == pytest.approx(1.25 * plain.seconds + 8 * 0.1)
    bp = predict("bp_1f1b", Work(4.0, 8.0, step=0.4, rho=1.25), stages=4, micro_batches=8)
    assert bp.seconds == pytest.approx(11 * 3.0 + 0.1)


@pytest.mark.parametrize("rho", [1.1, 1.5])
def test_break_even_is_where_the_formulas_cross(rho: float) -> None:
    """M rho < M + P - 1, so streaming is faster up to (P - 1) / (rho - 1)."""
    even = break_even(Work(4.0, 8.0, rho=rho), stages=8, most=100)
    assert even is not None and even - 1 < 7 / (rho - 1) + 1e-6 <= even + 1e-6


def test_there_is_no_break_even_without_overhead() -> None:
    assert break_even(WORK, stages=4, most=64) is None


def test_memory_and_bytes_by_method() -> None:
    work = Work(4.0, 8.0, message_bytes=100, target_bytes=10, parameter_bytes=4000)
    found = {p.method: p for p in grid(work, stages=[4], micro_batches=[8], methods=METHODS)}
    assert set(found) == set(METHODS)
    assert [found[m].graphs for m in ("streaming", "bp_1f1b", "bp_gpipe")] == [1, 4, 8]
    assert [found[m].graphs for m in ("bp_zb_h1", "bp_zb_h2", "bp_dualpipev", "bp_async")] == [4, 7, 4.5, 4]
    assert found["streaming"].bytes_per_batch == 8 * 110 and found["bp_1f1b"].bytes_per_batch == 8 * 200
    assert found["bp_dp"].bytes_per_batch == 2 * 3 / 4 * 4000


def test_a_slow_link_costs_back_propagation_more() -> None:
    work = Work(4.0, 8.0, message_bytes=100, target_bytes=2)
    slow = Machines(Link(bytes_per_second=100.0))  # a second per message, of three that a micro-batch takes on a stage
    seconds = {m: predict(m, work, stages=4, micro_batches=8, machines=slow).seconds for m in ("streaming", "bp_1f1b")}
    assert seconds["streaming"] == pytest.approx(8 * 3.0)
    assert seconds["bp_1f1b"] > 11 * 3.0 + 8 * 1.0


def test_advice_names_the_fastest_even_where_it_is_not_ours() -> None:
    few = list(grid(Work(4.0, 8.0, rho=1.1), stages=[8], micro_batches=[4]))
    without = [p for p in few if p.method in ("streaming", "bp_1f1b", "bp_gpipe")]
    assert "use streaming" in advice(without, Work(4.0, 8.0, rho=1.1), even=71)
    many = list(grid(Work(4.0, 8.0, rho=1.5), stages=[4], micro_batches=[64]))
    text = advice(many, Work(4.0, 8.0, rho=1.5), even=7)
    assert (
        "do not use streaming here, use zero bubble (bp_zb_h2)" in text
        and "streaming takes 1.50 times as long" in text
        and "up to M = 6" in text
    )


def test_a_thousand_stages_are_simulated_in_seconds() -> None:
    assert predict("streaming", WORK, stages=1024, micro_batches=4).bubble == pytest.approx(0.0, abs=1e-9)


def test_predictions_are_within_5_percent_of_what_was_measured() -> None:
    """Sleeping layers, all methods: 42 runs of which nothing but the sleep is used, and 21 with their stage times."""
    profile = RESULTS / "profile_sleeping.json"
    rows = against([RESULTS / "sleeping.json", profile], profile=profile)
    cases = {(row["times"], row["method"], row["stages"], row["micro_batches"]) for row in rows}
    assert len(cases) == len(rows) and len([case for case in cases if case[0] == "profile"]) >= 20
    off = [row for row in rows if abs(row["error"]) > 0.05]
    assert not off


def test_other_numbers_of_layers_and_replicas_are_predicted(tmp_path: Path) -> None:
    """As run/scaling.py writes them: 12 layers of 10 + 20 ms on 3 stages, 1 ms beyond each; half of M on 2 replicas."""
    shared = {"workload": "sleeping", "study": "strong", "layers": 12, "micro_batches": 4, "batches": 2}
    streaming = {**shared, "method": "streaming", "stages": 3, "seconds": 1.0}
    replicas = {**shared, "method": "bp_dp", "stages": 2, "seconds": 1.0}
    other = {**shared, "workload": "transformer", "method": "streaming", "stages": 2, "seconds": 1.0}
    path, profile = tmp_path / "scaling.json", tmp_path / "profile.json"
    header = {"settings": {"forward": 0.01, "backward": 0.02}}
    path.write_text(json.dumps({"header": header, "rows": [streaming, replicas, other]}))
    times = {"forward_ms": 51.0, "backward_ms": 51.0, "step_ms": 0.0}
    base = {"stages": 1, "micro_batches": 1, "batches": 1, "seconds": 1.0, "stage": 0, **times}
    rows = [{"method": method, **base} for method in ("streaming", "bp_1f1b")]
    profile.write_text(json.dumps({"header": {"settings": {"forward": 0.05, "backward": 0.05}}, "rows": rows}))
    found = against([path], profile=profile)
    assert [row["method"] for row in found] == ["streaming", "bp_dp"]
    assert found[0]["predicted"] == pytest.approx(4 * (8 * 0.032 + 2 * 0.011))
    assert found[1]["predicted"] == pytest.approx(2 * 2 * 12 * 0.032) and found[1]["error"] == pytest.approx(0.536)
    text = document(*planner(found))
    assert "P = 3, 12 layers, M = 4" in text and "| `bp_dp` |  | 1.00 s (+53.6 %) |" in text
    assert "0 of 2 configurations within 5 %" in text
    with pytest.raises(ValueError, match="expected runs of sleeping layers"):
        path.write_text(json.dumps({"header": header, "rows": [other]}))
        against([path], profile=profile)
    with pytest.raises(ValueError, match="its rows have no seconds"):
        path.write_text(json.dumps({"header": header, "rows": [{**shared, "method": "streaming", "stages": 2}]}))
        against([path], profile=profile)


def sentence(work: Work, *, stages: int, micro_batches: int, machines: Machines | None = None) -> str:
    found = list(grid(work, stages=[stages], micro_batches=[micro_batches], machines=machines))
    return advice(found, work, even=break_even(work, stages=stages, machines=machines))


def test_streaming_wins_on_a_link_that_gradients_would_have_to_cross_again() -> None:
    """50 ms away, and 4 micro-batches on 8 stages: whoever waits for a gradient waits for the whole way back."""
    work = Work(0.4, 0.8, step=0.01, rho=1.1, message_bytes=1e5, target_bytes=1e3, parameter_bytes=4e8)
    text = sentence(work, stages=8, micro_batches=4, machines=Machines(Link(12.5e6, 0.05)))
    assert ": use streaming; the best back-propagation, bp_zb_h2, takes " in text and "rho = 1.1, u = 10 ms" in text


def test_zero_bubble_wins_on_a_fast_link_by_rho() -> None:
    work = Work(0.4, 0.8, rho=1.2, message_bytes=1e5, parameter_bytes=4e11)
    text = sentence(work, stages=4, micro_batches=32, machines=Machines(Link(50e9, 1e-5)))
    assert "do not use streaming here, use zero bubble (bp_zb_h2), if its memory is there" in text
    assert "streaming takes 1.20 times as long" in text and "up to M = 15 (the break-even is M = 16)" in text


def test_1f1b_wins_where_its_bubble_is_small_and_the_others_are_not_to_be_had() -> None:
    found = list(grid(Work(0.4, 0.8, rho=1.3), stages=[2], micro_batches=[64], methods=("streaming", "bp_1f1b")))
    text = advice(found, Work(0.4, 0.8, rho=1.3), even=break_even(Work(0.4, 0.8, rho=1.3), stages=2))
    assert "do not use streaming here, use 1F1B; streaming takes 1.28 times as long" in text
    assert "up to M = 3 (the break-even is M = 4)" in text


def test_data_parallel_wins_where_the_gradients_are_small() -> None:
    work = Work(0.4, 0.8, rho=1.1, message_bytes=1e8, parameter_bytes=4e6)
    text = sentence(work, stages=8, micro_batches=64, machines=Machines(Link(125e6, 1e-3)))
    assert "do not use streaming here, use data parallel training (bp_dp), if the model and its optimizer fit" in text


def test_what_is_known_by_formula_cannot_be_faster_than_its_messages() -> None:
    work = Work(4.0, 8.0, message_bytes=100, parameter_bytes=1200)
    slow = Machines(Link(bytes_per_second=20.0))  # 5 seconds a message, 3 of computing
    times = {
        m: predict(m, work, stages=4, micro_batches=8, machines=slow).seconds
        for m in ("bp_dualpipev", "bp_interleaved", "bp_dp")
    }
    assert times["bp_dualpipev"] == times["bp_interleaved"] == pytest.approx(8 * 2 * 5.0)  # two chunks on each link
    late = predict("bp_dualpipev", WORK, stages=4, micro_batches=8, machines=Machines(Link(latency=30.0)))
    assert late.seconds == pytest.approx(7 * 0.5 + 8.0 + 2 * 2 * 3 * 30.0)  # there and back
    assert times["bp_dp"] == pytest.approx(2 * 12.0 + (2 * 3 / 4 * 1200 / 20.0 - 8.0))


def test_stages_are_cut_where_the_layers_are() -> None:
    layers = tuple(Layer(al, twin, size) for al, twin, size in ((3, 1, 100), (1, 1, 50), (1, 1, 20), (1, 1, 10)))
    work = Work(2.0, 4.0, layers=layers, target_bytes=1)
    assert work.shares(2, local=True) == ([0.5, 0.5], [100]) and work.shares(2, local=False) == ([0.5, 0.5], [50])
    assert work.shares(8, local=True)[0] == [1 / 8] * 8  # more than there are layers
    uneven = predict("streaming", work, stages=3, micro_batches=10)
    assert uneven.seconds == pytest.approx(10 * 3.0) and uneven.bubble_least == pytest.approx(0.0)
    assert uneven.bubble_most == pytest.approx(1 - (1 / 6) / (3 / 6)) and uneven.bytes_per_batch == 10 * 101


def test_memory_is_parameters_and_what_waits_for_backward() -> None:
    work = Work(
        1.0, 2.0, message_bytes=10, target_bytes=2, parameter_bytes=400, al_parameter_bytes=480,
        activation_bytes=80, al_activation_bytes=100,
    )  # fmt: skip
    held = {p.method: p.memory_bytes for p in grid(work, stages=[4], micro_batches=[8], methods=METHODS)}
    assert held["streaming"] == 4 * 480 / 4 + 100 / 4 + 4 * 12
    assert held["bp_1f1b"] == 4 * 400 / 4 + 4 * 80 / 4
    assert held["bp_gpipe"] == 4 * 400 / 4 + 8 * 80 / 4
    assert held["bp_zb_h1"] == held["bp_1f1b"] and held["bp_zb_h2"] == 4 * 400 / 4 + 7 * 80 / 4
    assert held["bp_async"] == 5 * 400 / 4 + 4 * 80 / 4
    assert held["bp_dp"] == 4 * 400 + 80


def test_unlike_machines_go_at_the_pace_of_the_slowest() -> None:
    machines = Machines(speeds=(1.0, 0.5, 2.0, 1.0))
    assert predict("streaming", WORK, stages=4, micro_batches=8, machines=machines).seconds == pytest.approx(8 * 6.0)
    assert predict("bp_async", WORK, stages=4, micro_batches=8, machines=machines).seconds == pytest.approx(48)
    with pytest.raises(ValueError, match="expected 3 numbers above 0"):
        predict("streaming", WORK, stages=3, micro_batches=8, machines=machines)
    with pytest.raises(ValueError, match="got 1 links for 3 stages: expected 2"):
        predict("streaming", WORK, stages=3, micro_batches=8, machines=Machines([Link()]))


def test_a_queue_absorbs_stragglers_that_a_flush_passes_on() -> None:
    def seconds(method: str, queue_depth: int = 2) -> tuple[float, float]:
        machines = Machines(jitter=Jitter.parse("slow:0.1:5"), queue_depth=queue_depth, seed=3)
        found = predict(method, WORK, stages=8, micro_batches=16, machines=machines)
        return found.seconds, found.spread

    alone = 16 * 1.5 * 1.4  # a stage without neighbours
    deep, shallow, flush = seconds("streaming", 32), seconds("streaming", 1), seconds("bp_1f1b")
    assert alone * 0.9 < deep[0] < shallow[0] < flush[0] and deep[1] > 0
    assert seconds("streaming", 32) == deep
    with pytest.raises(ValueError, match="knows no jitter"):
        predict("bp_dp", WORK, stages=4, micro_batches=8, machines=Machines(jitter=Jitter("lognormal", 0.1)))


@pytest.mark.parametrize("text", ["lognormal", "slow:2:5", "slow:0.1", "normal:0.1", "lognormal:-1"])
def test_what_is_no_distribution_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected lognormal:SIGMA, or slow:CHANCE:FACTOR"):
        Jitter.parse(text)


@pytest.mark.parametrize(("text", "mean"), [("lognormal:0.5", 1.0), ("slow:0.05:10", 1.45)])
def test_samples_have_the_mean_that_is_said(text: str, mean: float) -> None:
    jitter = Jitter.parse(text)
    assert jitter.mean == pytest.approx(mean)
    assert jitter.sample((20, 500, 4), seed=0).mean() == pytest.approx(mean, rel=0.03)


@pytest.mark.parametrize("bad", [{"method": "gpipe"}, {"stages": 0}, {"micro_batches": 0}])
def test_what_cannot_be_predicted_is_refused(bad: dict[str, object]) -> None:
    arguments: dict[str, object] = {"method": "streaming", "stages": 2, "micro_batches": 2, **bad}
    with pytest.raises(ValueError, match="expected"):
        predict(arguments.pop("method"), WORK, **arguments)  # type: ignore[arg-type]


def test_every_number_of_stages_has_a_panel_with_all_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture was blank once: its panels were an iterator, which hiding them had used up."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    draw(list(grid(WORK, stages=[2, 4, 8], micro_batches=[2, 4])), tmp_path / "plan.png")
    shown = [axes for axes in figures[0].axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in shown] == ["P = 2", "P = 4", "P = 8"]
    assert [len(axes.lines) for axes in shown] == [len(COMPARED), len(COMPARED), len(COMPARED) - 1]  # bp_async: M >= P


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def plan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs the command in this process."""
    monkeypatch.chdir(RESULTS.parents[1])
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["run/plan.py", *arguments])
        code, message = 0, ""
        try:
            runpy.run_path("run/plan.py", run_name="__main__")
        except SystemExit as end:
            code, message = (end.code, "") if isinstance(end.code, int) else (1, str(end.code))
        out = capsys.readouterr()
        return Done(code, out.out, out.err + message)

    return run


def test_the_command_advises_tabulates_and_draws(tmp_path: Path, plan: Callable[..., Done]) -> None:
    path = tmp_path / "plan.json"
    done = plan(
        *("--profile", "docs/results/profile_transformer.json", "--stages", "2,4", "--micro-batches", "2,8"),
        *("--link", "1gbit", "--parameters", "1e6", "--json", str(path), "--figure", str(tmp_path / "plan.png")),
        "--all",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Streaming is ") == 4 and "P = 4, M = 8, rho = " in done.stdout
    rows = json.loads(path.read_text())["rows"]
    by_setting = [len(COMPARED) - (stages > m) for stages in (2, 4) for m in (2, 8)]  # bp_async needs M >= P
    assert len(rows) == sum(by_setting) + 2 * 3 + 2 * 6  # three schedules for K = 1 on 2 stages, and K = 1, 2 on 4
    assert (tmp_path / "plan.png").exists() and (tmp_path / "plan.csv").exists()


def test_by_default_there_is_a_row_per_setting_and_a_sentence_per_number_of_stages(plan: Callable[..., Done]) -> None:
    done = plan("--forward-ms", "400", "--rho", "1.05", "--step-ms", "5", "--stages", "2,8", "--micro-batches", "4..64")
    assert done.returncode == 0, done.stderr
    assert [line[:5] for line in done.stdout.splitlines() if line.startswith("P =")] == ["P = 2", "P = 8"]
    fewest = "K = 4 with zb_h2 in groups of 2 at M = 4"  # as fast as streaming, with half as many layers
    assert fewest in done.stdout and len(done.stdout.splitlines()) < 28


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give --config, --forward-ms, or --profile"),
        (["--measure"], "--measure goes with --config"),
        (["--config", "missing.json"], "does not exist"),
        (["--forward-ms", "5", "--link", "fast"], "expected a speed such as"),
        (["--profile", "README.md"], "is no file of run/profile.py"),
    ],
)
def test_mistakes_end_with_one_line(arguments: list[str], words: str, plan: Callable[..., Done]) -> None:
    done = plan(*arguments)
    assert done.returncode == 1 and words in done.stderr


def test_a_config_is_planned_for_with_its_own_shapes_and_bytes(tmp_path: Path, plan: Callable[..., Done]) -> None:
    path = tmp_path / "plan.json"
    done = plan(
        *("--config", "ds_configs/cifar10_vgg_al.json", "--stages", "2,8", "--micro-batches", "4..16"),
        *("--link", "1gbit", "--json", str(path), "--markdown", str(tmp_path / "plan.md")),
    )
    assert done.returncode == 0, done.stderr
    assert "counted, at 10 TFLOP/s" in done.stdout and "has 4 AL layers: for more stages" in done.stdout
    header, rows = (json.loads(path.read_text())[key] for key in ("header", "rows"))
    assert [row["micro_batches"] for row in rows if row["method"] == "streaming"] == [4, 8, 16] * 2
    work = header["settings"]["work"]
    assert [layer["message_bytes"] for layer in work["layers"]] == [100 * 4 * n for n in (8192, 4096, 2048, 2048)]
    assert work["rho"] == pytest.approx(0.876, abs=1e-3) and work["al_activation_bytes"] > work["activation_bytes"]
    page = (tmp_path / "plan.md").read_text()
    assert "Predicted, not measured" in page and "| 8 | 16 | `streaming` |" in page.replace("**", "")


def test_queues_of_a_config_are_those_of_its_plan(tmp_path: Path, plan: Callable[..., Done]) -> None:
    """`receive_slots` was ignored once: the planner took two, whatever the config said."""
    config = json.loads(Path("ds_configs/cifar10_vgg_al.json").read_text())
    held = []
    for queue_depth, receive_slots in ((2, 2), (2, 6), (6, 2)):
        config["associated_learning"] |= {"queue_depth": queue_depth, "receive_slots": receive_slots}
        (tmp_path / "config.json").write_text(json.dumps(config))
        plan("--config", f"{tmp_path / 'config.json'}", "--stages", "2", "--micro-batches", "4",
             "--json", f"{tmp_path / 'plan.json'}")  # fmt: skip
        rows = json.loads((tmp_path / "plan.json").read_text())["rows"]
        held.append(next(row["memory_bytes"] for row in rows if row["method"] == "streaming"))
    assert held[0] < held[1] == held[2]


def test_messages_received_ahead_absorb_stragglers() -> None:
    def seconds(receive_slots: int) -> float:
        machines = Machines(jitter=Jitter.parse("slow:0.1:5"), queue_depth=1, receive_slots=receive_slots, seed=3)
        return predict("streaming", WORK, stages=8, micro_batches=16, machines=machines).seconds

    assert seconds(32) < seconds(8) < seconds(2)


def test_layers_are_timed_on_this_machine() -> None:
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "experiment": {
            "name": "x", "epochs": 1, "model": {"name": "mlp", "options": {"widths": [32, 32]}},
            "data": {"name": "fashion-mnist"},
        },
    }  # fmt: skip
    work = PlannedNetwork.of(config).measured(repeat=2)
    assert work.forward > 0 and work.backward > 0 and work.step > 0 and work.rho > 0
    assert [layer.message_bytes for layer in work.layers] == [4 * 32 * 4] * 2
    assert sum(layer.al for layer in work.layers) > 0
    with pytest.raises(ALConfigError, match='no "experiment" block'):
        PlannedNetwork.of({})


def test_what_autograd_saves_is_the_same_with_values_and_without() -> None:
    def held(device: str) -> int:
        layer, x = torch.nn.Linear(8, 4, device=device), torch.ones(3, 8, device=device, requires_grad=True)
        with saved_bytes(layer.parameters()) as count:
            torch.relu(layer(x) * 2.0)
        return count()

    assert held("cpu") == held("meta") == 3 * 8 * 4 + 3 * 4 * 4
