"""The public API: short, quick to import, documented, and its examples run."""

from __future__ import annotations

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import ds_al
from docs.generate import api
from ds_al.launch.ranks import run_ranks
from ds_al.parallel.world import join_world

ROOT = Path(__file__).resolve().parents[1]

HEAVY = ("torch", "deepspeed", "transformers", "datasets", "wandb", "matplotlib", "numpy")
IMPORTS = f"""
import sys
import ds_al
found = [name for name in {HEAVY} if name in sys.modules]
assert not found, f"import ds_al imports {{found}}"
for name in ds_al.__all__:
    if name != "ALTrainer":  # which is transformers' shape
        getattr(ds_al, name)
import torch.distributed
assert not torch.distributed.is_initialized()
found = [name for name in ("transformers", "datasets", "wandb", "matplotlib", "rich") if name in sys.modules]
assert not found, f"the public names import {{found}}"
"""


def test_importing_is_quick_starts_nothing_and_compiles_nothing(tmp_path: Path) -> None:
    """What takes seconds is not imported, which says the same on a slow machine as on a fast one."""
    environment = {"PYTHONPATH": str(ROOT), "TORCH_EXTENSIONS_DIR": str(tmp_path), "PATH": "/usr/bin:/bin"}
    result = subprocess.run(
        [sys.executable, "-c", IMPORTS], env=environment, cwd=tmp_path, text=True, capture_output=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.iterdir()), "an op was compiled"


def test_the_public_names_are_few_and_there() -> None:
    assert ds_al.__all__ == sorted(ds_al.__all__, key=lambda name: (name.islower(), name)) and len(ds_al.__all__) < 25
    for name in ds_al.__all__:
        assert getattr(ds_al, name).__doc__, name
    assert set(ds_al.__all__) <= set(dir(ds_al))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ds_al.nothing


def test_the_version_is_that_of_the_metadata() -> None:
    assert f'\nversion = "{ds_al.__version__}"\n' in (ROOT / "pyproject.toml").read_text()


def test_the_page_is_up_to_date() -> None:
    assert (ROOT / "docs/api.md").read_text() == api.page(), "run: make docs"


def test_the_page_says_what_the_docstrings_say() -> None:
    page = api.page()
    assert all(f"\n## ds_al.{name}\n" in page for name in ds_al.__all__)
    headings = {re.sub(r"[^\w -]", "", line[3:].lower()) for line in page.splitlines() if line.startswith("## ")}
    assert set(re.findall(r"\(#(\w+)\)", page)) == headings
    assert "### ALPipelineEngine.train_batch" in page and "### ALPipelineEngine.save_checkpoint" in page
    assert "* `num_classes`: `V`, the width" in page and "**Raises**" in page
    assert ":class:" not in page and " at 0x" not in page, "no address of this process, no markup of another format"
    assert "* `load_best_model_at_end`: Ends on the weights" in page, "fields of arguments have their descriptions"


class WithoutDeepSpeed(doctest.OutputChecker):
    """Takes what DeepSpeed prints when it cuts a network out of an example's output."""

    _PRINTED = re.compile(r"^(SEED_LAYERS=|Using topology: |stage=\d+ layers=| +\d+: ).*\n", re.MULTILINE)

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return super().check_output(want, self._PRINTED.sub("", got), optionflags)


def run_doctests() -> dict[str, list[int]]:
    """Worker: examples in docstrings of public names, as ``[tried, failed]``."""
    import torch
    from deepspeed.pipe import LayerSpec
    from torch import nn

    import ds_al.convert
    import ds_al.data

    join_world()  # which prints, too, the first time
    names: dict[str, Any] = {"ds_al": ds_al, "torch": torch, "nn": nn, "LayerSpec": LayerSpec}
    objects = [getattr(ds_al, name) for name in ds_al.__all__]
    objects += [getattr(importlib.import_module(module), name) for module, found in api.ROOMS.items() for name in found]
    found = {}
    for value in objects:
        for test in doctest.DocTestFinder().find(value, value.__name__, module=False, globs=names):
            if test.examples:
                result = doctest.DocTestRunner(checker=WithoutDeepSpeed()).run(test)
                found[test.name] = [result.attempted, result.failed]
    return found


@pytest.mark.distributed
def test_examples_in_docstrings_run() -> None:
    (found,) = run_ranks(f"{__name__}:run_doctests", 1)
    assert not [name for name, (_, failed) in found.items() if failed]
    shown = {"ALLayer", "ALLayerSpec", "from_layers", "ALTrainingArguments", "ShuffledLoader"}
    assert shown | {"batch_fn", "from_pretrained", "initialize", "predict"} <= found.keys()
