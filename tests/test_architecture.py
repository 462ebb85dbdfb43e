"""The rooms: few files at the top, imports by the contract of ``pyproject.toml``, and the page that shows them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from docs.generate import architecture

ROOT = Path(__file__).resolve().parents[1]


def test_imports_keep_the_contract() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo"]
    result = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert result.returncode == 0, result.stdout


def test_the_contract_has_no_exceptions() -> None:
    _, exceptions = architecture.contract()
    assert not exceptions


def test_the_top_is_small_and_holds_the_idea() -> None:
    names = {path.stem for path in (ROOT / "ds_al").glob("*.py")}
    assert len(names) <= 20
    assert set(architecture.IDEA) <= names


def test_private_names_of_deepspeed_are_in_few_files() -> None:
    names = (
        "_topo", "_grid", "_layer_specs", "_local_start", "_local_stop", "_num_layers", "_set_bounds",
        "_partition_layers",
        "_configure_optimizer", "_configure_basic_optimizer", "_is_supported_optimizer", "_configure_python_gc",
        "_INSTRUCTION_MAP", "_reserve_pipe_buffers", "_aggregate_total_loss", "_exec_schedule", "_next_batch",
    )  # fmt: skip
    pattern = re.compile(rf"(?:\.|def )({'|'.join(names)})\b")
    twins = ("engine", "twin", "zero_bubble", "dualpipev", "delayed")
    allowed = {"host.py", "engine.py", "training/engine.py", "training/optimizer.py", "optim/names.py", "module.py"}
    allowed |= {f"baseline/{name}.py" for name in twins}
    found = {
        str(path.relative_to(ROOT / "ds_al"))
        for path in (ROOT / "ds_al").rglob("*.py")
        if pattern.search(path.read_text())
    }
    assert found == allowed


def test_the_page_is_up_to_date() -> None:
    found = architecture.house()
    page, picture = ROOT / "docs/architecture.md", ROOT / "docs/figures/architecture.svg"
    assert architecture.without_sizes(page.read_text()) == architecture.without_sizes(architecture.page(found)), (
        "run: make docs"
    )
    assert picture.read_text() == architecture.picture(found), "run: make docs"


def test_the_picture_has_every_room_and_only_arrows_downward() -> None:
    found = architecture.house()
    drawn = architecture.picture(found)
    assert all(f">{room}</text>" in drawn for layer in found.layers for room in layer.rooms)
    for room, other in found.reduced():
        assert found.row[room] <= found.row[other]
        assert other in found.uses[room]


def test_arrows_that_follow_from_others_are_left_out() -> None:
    layers = [architecture.Layer((name,), are_independent=True) for name in "abc"]
    uses: dict[str, set[str]] = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert architecture.House(layers, uses, {}).reduced() == [("a", "b"), ("b", "c")]


def test_sizes_are_not_compared() -> None:
    row = "| 3 | [`planner`](../ds_al/planner) | Purpose | `config` | {} |"
    assert architecture.without_sizes(row.format("9 | 1,397")) == architecture.without_sizes(row.format("10 | 80"))
    assert "`config`" in architecture.without_sizes(row.format("9 | 1,397"))
