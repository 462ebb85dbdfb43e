"""Runs README's example and examples/ with the ds_al that is installed; .ci/test-wheel calls it in a new folder."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from importlib.metadata import files
from pathlib import Path

CHECKOUT = Path(os.environ["DS_AL_CHECKOUT"])
PACKAGE_DATA = (".py", ".npz", ".json", ".j2", ".css", ".js", ".typed")
CONFIG = {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 4,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
}
SHORT = {"text_classifier": 25, "vision_from_layers": 6, "language_model": 3, "trainer": 25, "own_loop": 4}
"""Batches of the examples that take ``--batches``."""


def check_files() -> None:
    """Every file of the package that is no cache is in the wheel, but for the studies."""
    there = {str(path) for path in files("ds_al") or ()}
    wanted = {
        str(path.relative_to(CHECKOUT))
        for path in (CHECKOUT / "ds_al").rglob("*")
        if path.is_file() and not {"__pycache__", "studies"} & set(path.parts)
    }
    assert not wanted - there, f"not in the wheel: {sorted(wanted - there)}"
    assert {Path(name).suffix for name in wanted} >= set(PACKAGE_DATA)
    foreign = {name for name in there if not name.startswith(("ds_al/", "ds_al-")) or "/studies/" in name}
    assert not foreign, f"in the wheel, and not of the package: {sorted(foreign)}"


def launch(script: str, *args: str, ranks: int = 2) -> str:
    """Runs a script through DeepSpeed's launcher and returns what it printed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", str(ranks)]
    start = time.monotonic()
    result = subprocess.run(
        [*command, "--master_port", str(port), script, *args],
        text=True, capture_output=True, timeout=600, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    print(f"{script}: exit code {result.returncode}, {time.monotonic() - start:.0f} s", flush=True)
    if result.returncode:
        sys.exit(result.stdout[-4000:] + result.stderr[-4000:])
    return result.stdout


def main() -> None:
    """Checks one thing after another."""
    import ds_al

    home = Path(ds_al.__file__).resolve()
    assert CHECKOUT not in home.parents, f"ds_al comes from the checkout: {home}"
    check_files()
    code = re.search(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    assert code is not None
    Path("config.json").write_text(json.dumps(CONFIG))
    taken_for_granted = "import torch\nx = torch.randn(8, 784)\nbatches = iter([(x, torch.randint(10, (8,)))] * 400)\n"
    Path("readme.py").write_text(f"{taken_for_granted}{code.group(1)}\nprint(f'scores {{tuple(scores.shape)}}')\n")
    printed = launch("readme.py")
    assert "scores (8, 10)" in printed, printed
    for path in sorted(Path("examples").glob("*.py")):
        if path.stem == "plain_loop":
            subprocess.run([sys.executable, str(path)], check=True, timeout=600)
        else:
            launch(str(path), "--batches", str(SHORT[path.stem]))
    for command in (["doctor", "--help"], ["consolidate", "--help"], ["export", "--help"]):
        subprocess.run([sys.executable, "-m", "ds_al", *command], check=True, stdout=subprocess.DEVNULL, timeout=120)


if __name__ == "__main__":
    main()
