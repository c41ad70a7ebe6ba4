"""How dense the code is: ``python tests/readability.py [FOLDER]`` prints figures of every package.

Blank lines inside functions (docstrings left out), conditional expressions and comments for each 100 lines of code.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SRC = Path(__file__).resolve().parents[1] / "src" / "flora"

# Where numbers are computed: what is not plain there is explained in the code.
COMPUTE = (
    "layers",
    "tucker",
    "tuner/gradient",
    "tuner/forward.py",
    "tuner/merging.py",
    "tuner/reading.py",
    "tuner/read_tensors.py",
)


@dataclass
class Density:
    """Counts over some files."""

    code: int = 0
    inside: int = 0
    blank: int = 0
    conditional: int = 0
    comments: int = 0
    trailing: int = 0
    statements: int = 0

    def add(self, path: Path) -> None:
        """Counts one more file."""
        text = path.read_text(encoding="utf-8")
        lines, tree = text.splitlines(), ast.parse(text)
        self.code += sum(bool(line.strip()) and not line.lstrip().startswith("#") for line in lines)
        for node in ast.walk(tree):
            self.statements += isinstance(node, ast.stmt)
            self.conditional += isinstance(node, ast.IfExp)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = lines[first_line(node) - 1 : node.end_lineno]
                self.inside += len(body)
                self.blank += sum(not line.strip() for line in body)

        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                self.comments += 1
                self.trailing += bool(token.line[: token.start[1]].strip())

    def __str__(self) -> str:
        per = 100 / max(1, self.code)
        return (
            f"{self.code:6,} lines of code, {self.statements:6,} statements, "
            f"{100 * self.blank / max(1, self.inside):4.1f} % blank lines in functions, per 100 lines "
            f"{per * self.conditional:.1f} conditional expressions and {per * self.comments:.1f} comments "
            f"({self.trailing} of {self.comments} trailing)"
        )


def first_line(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The line after the docstring, or that of the first statement."""
    first = function.body[0]
    if ast.get_docstring(function) is None:
        return first.lineno
    return (first.end_lineno or first.lineno) + 1


def densities(root: Path = SRC) -> Iterator[tuple[str, Density]]:
    """Each package, then the whole."""
    whole = Density()
    for package in sorted(path for path in root.iterdir() if path.is_dir() and path.name != "__pycache__"):
        found = Density()
        for path in sorted(package.rglob("*.py")):
            found.add(path)
            whole.add(path)
        yield package.name, found

    for path in sorted(root.glob("*.py")):
        whole.add(path)
    yield "all", whole


def compute_density(root: Path = SRC) -> Density:
    """The files that compute, taken together."""
    found = Density()
    for place in COMPUTE:
        path = root / place
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            found.add(file)

    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else SRC
    for name, density in densities(folder):
        print(f"{name:12}{density}")
    print(f"{'compute':12}{compute_density(folder)}")
