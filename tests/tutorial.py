"""The tutorial's page as a program and as a notebook.

The page is the source. `python -m tests.tutorial` runs it, writes its outputs into it, and makes the notebook of it.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import sys
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_abpem.cli import main

PAGE = Path(__file__).parent.parent / "docs" / "tutorials" / "your-own-model.md"
NOTEBOOK = PAGE.with_suffix(".ipynb")
_BLOCK = re.compile(r'```(python|console)(?: title="([\w.]+)")?\n(.*?)```\n(?:\n```text\n(.*?)```\n)?', re.DOTALL)


@dataclass(frozen=True)
class Cell:
    """A block of the page: `words` is Markdown, Python or one command; `file` is where a module is saved."""

    kind: str
    words: str
    file: str = ""
    output: str = ""


def cells(page: str) -> list[Cell]:
    """Cut a page into Markdown and code."""
    found, end = [], 0
    for block in _BLOCK.finditer(page):
        found.append(Cell("markdown", page[end : block.start()].strip()))
        found.append(Cell(block[1], block[3].removeprefix("$ ").strip(), block[2] or "", block[4] or ""))
        end = block.end()
    return [*found, Cell("markdown", page[end:].strip())]


def run(parts: list[Cell], folder: Path) -> tuple[list[Cell], dict]:
    """Run the cells in a folder; return them with their outputs, and the names that they made."""
    namespace: dict[str, Any] = {}
    ran, here, path = [], Path.cwd(), list(sys.path)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    try:
        for part in parts:
            shown = io.StringIO()
            with redirect_stdout(shown):
                if part.file:
                    (folder / part.file).write_text(part.words + "\n")
                elif part.kind == "python":
                    exec(compile(part.words, str(PAGE), "exec"), namespace)
                elif part.kind == "console":
                    main(shlex.split(part.words)[1:])
            lines = [line.rstrip() for line in shown.getvalue().splitlines()]
            ran.append(Cell(part.kind, part.words, part.file, "\n".join(lines).strip("\n")))
    finally:
        os.chdir(here)
        sys.path[:] = path
    return ran, namespace


def page(parts: list[Cell]) -> str:
    """The page of the cells, with their outputs."""
    blocks = []
    for part in parts:
        if part.kind == "markdown":
            blocks.append(part.words)
            continue
        title = f' title="{part.file}"' * bool(part.file)
        dollar = "$ " * (part.kind == "console")
        blocks.append(f"```{part.kind}{title}\n{dollar}{part.words}\n```")
        if part.output:
            blocks.append(f"```text\n{part.output.rstrip()}\n```")
    return "\n\n".join(blocks) + "\n"


def notebook(parts: list[Cell]) -> str:
    """The notebook of the cells, as JSON."""
    made = []
    for number, part in enumerate(parts):
        own: dict[str, Any] = {"cell_type": "code", "id": f"cell-{number}", "metadata": {}}
        if part.kind == "markdown":
            words = re.sub(r"The page is also .*? code, on a CPU", "The outputs are those of a CPU", part.words)
            words = re.sub(r"\]\(\.\./([\w-]+)\.md\)", r"](../\1/)", words)
            made.append({**own, "cell_type": "markdown", "source": _lines(words)})
            continue
        magic = f"%%writefile {part.file}\n" if part.file else "!" if part.kind == "console" else ""
        stream = [{"output_type": "stream", "name": "stdout", "text": _lines(part.output)}] if part.output else []
        made.append({**own, "execution_count": None, "outputs": stream, "source": _lines(magic + part.words)})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {"cells": made, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


def _lines(words: str) -> list[str]:
    return words.splitlines(keepends=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        ran, _ = run(cells(PAGE.read_text(encoding="utf-8")), Path(folder))
    PAGE.write_text(page(ran), encoding="utf-8")
    NOTEBOOK.write_text(notebook(cells(page(ran))), encoding="utf-8")
