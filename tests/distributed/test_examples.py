"""What README and examples/ show does run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ds_al.launch import run_ranks

ROOT = Path(__file__).resolve().parents[2]


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


def test_plain_loop() -> None:
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples/plain_loop.py")],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    accuracies = [float(line.split()[-1]) for line in result.stdout.splitlines() if "accuracy" in line]
    assert len(accuracies) == 6 and min(accuracies) > 0.7
