"""Measure how the code is written: `python tests/style.py [FOLDER]` prints a table.

The goals stand in `GOALS`; tests/test_style.py holds nexus_ds to them.
Words: a code line carries code (no docstring, no comment of its own); a decision is a branch, a
loop, an `except`, a ternary, an `and`/`or`, or a part of a comprehension that loops or filters.
"""

from __future__ import annotations

import ast
import io
import statistics
import sys
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
DECISIONS = (ast.If, ast.IfExp, ast.For, ast.While, ast.ExceptHandler, ast.Assert)
WIDTH = 100
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Goal(NamedTuple):
    """One measure's bound."""

    least: float = 0.0
    most: float = float("inf")


GOALS = {
    "function lines, median": Goal(most=10),
    "function lines, p95": Goal(most=30),
    "tokens per code line": Goal(most=8.0),
    "lines over 100 characters": Goal(most=0),
    "comment lines per 100 code lines": Goal(least=5.0),
    "Any": Goal(most=150),
    "modules without docstring": Goal(most=0),
    "public definitions without docstring": Goal(most=0),
    "arguments and results without type": Goal(most=0),
    "modules without a test at the mirrored path": Goal(most=0),
}


def quantile(values: Sequence[int], share: float) -> int:
    """Return the value that `share` of the values do not exceed; 0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0


@dataclass
class Counts:
    """Sums over files."""

    file_lines: list[int] = field(default_factory=list)
    function_lines: list[int] = field(default_factory=list)
    arguments: list[int] = field(default_factory=list)
    code_lines: int = 0
    tokens: int = 0
    long_lines: int = 0
    comments: int = 0
    """Lines with one."""
    docstring_lines: int = 0
    decisions: int = 0
    comprehensions: int = 0
    ternaries: int = 0
    any_names: int = 0
    any_dicts: int = 0
    deferred: int = 0
    bare_modules: int = 0
    bare_definitions: int = 0
    untyped: int = 0
    unmirrored: list[str] = field(default_factory=list)


def functions(tree: ast.AST) -> Iterator[Function]:
    """Yield every function, methods and inner ones too."""
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def text_lines(tree: ast.AST) -> set[int]:
    """Return the lines of docstrings, those of attributes too."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def count_tokens(text: str, prose: set[int], counts: Counts) -> None:
    """Add tokens, code lines and comments of one file."""
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            counts.comments += 1
        elif token.type not in LAYOUT and token.start[0] not in prose:
            counts.tokens += 1
            code |= set(range(token.start[0], token.end[0] + 1))
    counts.code_lines += len(code)
    counts.docstring_lines += len(prose)
    counts.long_lines += sum(len(line) > WIDTH for line in text.splitlines())


def count_decisions(tree: ast.AST, counts: Counts) -> None:
    """Add what makes a reader stop: branches, comprehensions, ternaries."""
    for node in ast.walk(tree):
        counts.decisions += isinstance(node, DECISIONS)
        counts.ternaries += isinstance(node, ast.IfExp)
        if isinstance(node, ast.BoolOp):
            counts.decisions += len(node.values) - 1
        if isinstance(node, ast.comprehension):
            counts.comprehensions += 1
            counts.decisions += 1 + len(node.ifs)


def count_types(tree: ast.AST, counts: Counts) -> None:
    """Add uses of Any, and arguments and results that say no type."""
    for node in ast.walk(tree):
        counts.any_names += isinstance(node, ast.Name) and node.id == "Any"
        if isinstance(node, ast.Subscript):
            counts.any_dicts += ast.unparse(node) == "dict[str, Any]"
    for function in functions(tree):
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        named = [argument for argument in arguments if argument.arg not in ("self", "cls")]
        counts.arguments.append(len(named))
        counts.untyped += sum(argument.annotation is None for argument in named)
        counts.untyped += function.returns is None


def count_definitions(tree: ast.Module, counts: Counts) -> None:
    """Add function lengths, missing docstrings and imports inside functions."""
    counts.bare_modules += bool(tree.body) and ast.get_docstring(tree) is None
    for node in tree.body:
        public = isinstance(node, (*Function.__args__, ast.ClassDef)) and node.name[0] != "_"
        counts.bare_definitions += public and ast.get_docstring(node) is None
    for function in functions(tree):
        counts.function_lines.append((function.end_lineno or 0) - function.lineno + 1)
        for node in ast.walk(function):
            own = isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nexus_ds")
            counts.deferred += own


def mirror(path: Path, folder: Path) -> Path:
    """Return where a module's tests belong."""
    inside = path.relative_to(folder)
    # a dense family's record is a row of the tables that these tests go through
    if inside.parent.name == "families":
        return ROOT / "tests" / inside.with_name("test_record.py")
    return ROOT / "tests" / inside.with_name(f"test_{inside.stem.strip('_')}.py")


def measure(folder: Path) -> Counts:
    """Count over all Python files of a folder."""
    counts = Counts()
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text()
        tree = ast.parse(text)
        counts.file_lines.append(len(text.splitlines()))
        count_tokens(text, text_lines(tree), counts)
        count_decisions(tree, counts)
        count_types(tree, counts)
        count_definitions(tree, counts)
        if path.name != "__init__.py" and not mirror(path, folder).is_file():
            counts.unmirrored.append(str(path.relative_to(folder)))
    return counts


def table(counts: Counts) -> dict[str, float]:
    """Return each measure by its name."""
    per_100 = 100 / max(counts.code_lines, 1)
    return {
        "files": len(counts.file_lines),
        "lines": sum(counts.file_lines),
        "file lines, median": statistics.median(counts.file_lines),
        "file lines, p95": quantile(counts.file_lines, 0.95),
        "file lines, most": max(counts.file_lines),
        "function lines, median": statistics.median(counts.function_lines),
        "function lines, p90": quantile(counts.function_lines, 0.9),
        "function lines, p95": quantile(counts.function_lines, 0.95),
        "function lines, most": max(counts.function_lines),
        "arguments, p95": quantile(counts.arguments, 0.95),
        "arguments, most": max(counts.arguments),
        "code lines": counts.code_lines,
        "tokens per code line": counts.tokens / max(counts.code_lines, 1),
        "lines over 100 characters": counts.long_lines,
        "decisions per 100 code lines": counts.decisions * per_100,
        "comprehensions per 100 code lines": counts.comprehensions * per_100,
        "ternaries per 100 code lines": counts.ternaries * per_100,
        "comment lines per 100 code lines": counts.comments * per_100,
        "docstring lines per 100 lines": 100 * counts.docstring_lines / sum(counts.file_lines),
        "Any": counts.any_names,
        "dict[str, Any]": counts.any_dicts,
        "imports of the package inside functions": counts.deferred,
        "modules without docstring": counts.bare_modules,
        "public definitions without docstring": counts.bare_definitions,
        "arguments and results without type": counts.untyped,
        "modules without a test at the mirrored path": len(counts.unmirrored),
    }


def main(folder: Path) -> None:
    """Print every measure, its goal where it has one, and the modules without a mirror."""
    counts = measure(folder)
    for name, value in table(counts).items():
        goal = GOALS.get(name, Goal())
        bounds = [f"at least {goal.least:g}"] * (goal.least > 0)
        bounds += [f"at most {goal.most:g}"] * (goal.most < float("inf"))
        print(f"{name:45} {value:10.1f}".replace(".0", "  ") + f"  {' '.join(bounds)}")
    for path in counts.unmirrored:
        print(f"no mirror: {path}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "nexus_ds")
