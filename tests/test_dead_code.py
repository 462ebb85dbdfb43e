"""Nothing is left that nobody uses: every definition of the package is named somewhere else, outside of tests."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("ds_al", "run", "examples", "docs/generate", ".ci")
SOURCES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
BY_NAME = re.compile(r"on_|_exec_|_[A-Z]|__")
"""Names that are called by a rule: of instructions, of transformers' events, of Python's protocols."""


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
