"""Nothing is left over: every definition is used outside of tests, and every name that a docstring refers to exists."""

from __future__ import annotations

import ast
import importlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("ds_al", "run", "examples", "docs/generate", ".ci")
SOURCES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
BY_NAME = re.compile(r"on_|_exec_|_[A-Z]|__|pytest_")
"""Names that are called by a rule: of instructions, of transformers' events, of Python's protocols, of pytest."""


def definitions(path: Path) -> Iterator[str]:
    """Names of a file's functions, classes and methods; of a validator or a property setter none."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not BY_NAME.match(node.name):
            decorators = " ".join(ast.unparse(each) for each in node.decorator_list)
            if not re.search(r"validator|overload|register|setter", decorators):
                yield node.name


def unused(sources: list[Path], *, public: str) -> list[str]:
    """Definitions whose name occurs nowhere else in the sources, nor in what documents the public API."""
    words = Counter(word for path in sources for word in re.findall(r"\w+", path.read_text()))
    defined = Counter(name for path in sources for name in definitions(path))
    known = set(re.findall(r"\w+", public))
    return sorted(name for name, times in defined.items() if words[name] == times and name not in known)


def test_every_definition_is_used() -> None:
    """``EvaluationSchedule``, ``training_step`` and ``al_step`` once were in the package for nothing."""
    public = "\n".join(page.read_text() for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    helpers = {name for path in (ROOT / "docs/generate").glob("*.py") for name in definitions(path)}
    assert [name for name in unused(SOURCES, public=public) if name not in helpers] == []


def test_an_unused_definition_is_found(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text("def used(): ...\ndef unused_one(): ...\nclass Schedule:\n    def steps(self): used()\n")
    assert unused([file], public="Schedule") == ["steps", "unused_one"]


def exists(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def test_names_that_docstrings_refer_to_exist() -> None:
    """After modules moved, some docstrings referred to the old ones."""
    texts = [path.read_text() for path in (ROOT / "ds_al").rglob("*.py")]
    names = {name for text in texts for name in re.findall(r":(?:mod|class|func|meth|data):`~?(ds_al[\w.]*)`", text)}
    assert len(names) > 50
    assert sorted(name for name in names if not exists(name)) == []
