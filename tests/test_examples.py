"""What README and examples/ show does run."""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_al.launch.ranks import run_ranks
from tests.support.hugging_face_models import CASES
from tests.support.scripts import launch

ROOT = Path(__file__).resolve().parents[1]


def readme_example(folder: str) -> list[int]:
    """Worker: the README's Python block, with data and a config that it takes for granted."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code is not None
    os.chdir(folder)
    x = torch.randn(8, 784)
    names: dict[str, Any] = {"batches": iter([(x, torch.randint(10, (8,)))] * 400), "x": x}
    exec(code.group(1), names)
    return list(names["scores"].shape)


@pytest.mark.distributed
def test_readme_example(tmp_path: Path) -> None:
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert run_ranks(f"{__name__}:readme_example", 2, folder=str(tmp_path)) == [[8, 10]] * 2


def run_examples() -> dict[str, str]:
    """Worker: what each example prints, in short."""
    printed = {}
    batches_of = {"text_classifier": 25, "vision_from_layers": 6, "language_model": 3, "trainer": 25, "own_loop": 4}
    for name, batches in batches_of.items():
        sys.argv = [name, "--batches", str(batches)]
        with redirect_stdout(io.StringIO()) as output:
            runpy.run_path(str(ROOT / f"examples/{name}.py"), run_name="__main__")
        printed[name] = output.getvalue()
    return printed


def run_page(folder: str) -> list[Any]:
    """Worker: all Python of docs/from_your_model.md, with the model and the data that it takes for granted."""
    os.chdir(folder)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(4, 40, (4, 7), generator=generator) for _ in range(12)]
    mask, labels = torch.ones(4, 7, dtype=torch.int64), torch.tensor([0, 1, 2, 3])
    names: dict[str, Any] = {
        "collated": iter([{"input_ids": x, "attention_mask": mask, "labels": labels} for x in ids]),
        "stream": iter([{"text": x, "mask": mask, "labels": labels} for x in ids]),
    }
    for code in re.findall(r"```python\n(.*?)```", (ROOT / "docs/from_your_model.md").read_text(), re.DOTALL):
        exec(code, names)
    return [names["kind"], type(names["model"]).__name__, float(names["loss"]), len(list(Path("out-vision").iterdir()))]


def everything(folder: str) -> tuple[dict[str, str], list[Any]]:
    """Worker: both."""
    return run_examples(), run_page(folder)


@pytest.mark.distributed
def test_examples_of_conversion(tmp_path: Path) -> None:
    CASES["bert"].build().save_pretrained(tmp_path / "my-bert")
    (first, page), (second, other) = run_ranks(f"{__name__}:everything", 2, folder=str(tmp_path))
    assert page == other and page[:2] == ["classifier", "BertForSequenceClassification"] and page[3] == 1
    text, vision, language = (
        [float(number) for number in re.findall(r"\d+\.\d+(?:e-?\d+)?", first[name].split("at the exits")[1])]
        for name in ("text_classifier", "vision_from_layers", "language_model")
    )
    assert len(text) == 5 and text[3] == pytest.approx(text[4]) and text[3] > 0.8, "last exit and plain model agree"
    assert len(vision) == 5 and vision[3] == pytest.approx(vision[4], abs=0.002) and max(vision) > 0.2
    assert len(language) == 2 and max(language) < 90 and "def " in first["language_model"]
    right = [re.search(r"accuracy (\S+) as classifier", each["trainer"]) for each in (first, second)]
    assert right[0] and right[1] and float(right[0][1]) == float(right[1][1]) > 0.6
    assert "'eval_right'" in first["trainer"] and "'eval_right'" not in second["trainer"], "logs are printed once"
    assert "plain model" not in second["text_classifier"]
    exits = [float(number) for number in re.findall(r"0\.\d+", first["own_loop"])]
    assert len(exits) in (4, 6) and max(exits) > 0.4, "two exits in each epoch, at least two epochs"
    assert "accuracy" not in second["own_loop"]


def test_examples_are_short() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in (ROOT / "examples").glob("*.py")}
    assert not {name: lines for name, lines in lengths.items() if lines >= 60}


@pytest.mark.distributed
def test_plain_loop(tmp_path: Path) -> None:
    result = launch("examples/plain_loop.py", [], ranks=1, folder=tmp_path, env={}, timeout=200)
    assert result.returncode == 0, result.stderr
    accuracies = [float(line.split()[-1]) for line in result.stdout.splitlines() if "accuracy" in line]
    assert len(accuracies) == 6 and min(accuracies) > 0.7
