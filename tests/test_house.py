"""The house rules hold: sizes, docstrings, forbidden calls, import layers, lint and types."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILE_LINES, FUNCTION_LINES = 300, 60
REASON = "# size:"  # an exception is allowed where its reason is written
FORBIDDEN_CALLS = {
    "eval", "exec", "os.system", "pickle.load", "pickle.loads", "pickle.dump", "pickle.dumps",
    "torch.load", "torch.save", "joblib.load", "marshal.loads", "yaml.load",
}  # fmt: skip
UNFINISHED = ("TODO", "FIXME", "XXX", "NotImplementedError", "not implemented", "placeholder", "for now")
MACHINE_PATHS = ("/work/", "/root/", "/home/", "/tmp/")
Function = ast.FunctionDef | ast.AsyncFunctionDef

SOURCES = sorted((ROOT / "sprat").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


@functools.cache
def parsed(path: Path) -> ast.Module:
    """The file's tree, made when a rule first asks for it: whoever only collects these tests has no use for it."""
    return ast.parse(path.read_text(encoding="utf-8"))


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def name_of(node: ast.AST) -> str:
    """``a.b.c`` of a dotted name, else the empty string."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def functions(path: Path) -> Iterator[Function]:
    return (node for node in ast.walk(parsed(path)) if isinstance(node, Function))


def short(path: Path, line: int = 0) -> str:
    return f"{path.relative_to(ROOT)}{f':{line}' if line else ''}"


def test_files_fit_in_a_head() -> None:
    long = [
        f"{short(path)}: {len(lines)} lines"
        for path in SOURCES
        if len(lines := lines_of(path)) > FILE_LINES and not any(REASON in line for line in lines[:5])
    ]
    assert not long, long


def test_functions_fit_on_a_screen() -> None:
    long = [
        f"{short(path, f.lineno)} {f.name}: {size} lines"
        for path in SOURCES
        for f in functions(path)
        if (size := (f.end_lineno or f.lineno) - f.lineno + 1) > FUNCTION_LINES
        and REASON not in lines_of(path)[f.lineno - 1]
    ]
    assert not long, long


def public(path: Path) -> Iterator[Function | ast.ClassDef]:
    """Public functions and classes at the top of ``path``, and the public methods of those classes."""
    for node in parsed(path).body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (m for m in node.body if isinstance(m, Function) and not m.name.startswith("_"))


def test_whatever_is_public_is_documented() -> None:
    bare = [
        f"{short(path, n.lineno)} {n.name}" for path in SOURCES for n in public(path) if ast.get_docstring(n) is None
    ]
    bare += [short(path) for path in SOURCES if ast.get_docstring(parsed(path)) is None]
    assert not bare, bare


def test_nothing_dangerous_is_called() -> None:
    found = []
    for path in SOURCES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Call) and name_of(node.func) in FORBIDDEN_CALLS:
                found.append(f"{short(path, node.lineno)} {name_of(node.func)}")
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
                found += [f"{short(path, node.lineno)} imports {m}" for m in modules if m.split(".")[0] == "pickle"]
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                found.append(f"{short(path, node.value.lineno)} trust_remote_code")
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                found.append(f"{short(path, node.lineno)} bare except")
    assert not found, found


def test_nothing_is_left_unfinished() -> None:
    found = [
        f"{short(path, number)} {word}"
        for path in SOURCES
        for number, line in enumerate(lines_of(path), 1)
        for word in UNFINISHED
        if word in line
    ]
    assert not found, found


def test_no_file_knows_this_machine() -> None:
    found = [
        f"{short(path, number)} {line.strip()[:60]}"
        for path in SOURCES
        for number, line in enumerate(lines_of(path), 1)
        if any(f'"{place}' in line or f"'{place}" in line for place in MACHINE_PATHS)
    ]
    assert not found, found


def test_every_test_can_fail() -> None:
    weak = []
    for path in TESTS:
        for f in functions(path):
            if not f.name.startswith("test"):
                continue
            asserts = [n for n in ast.walk(f) if isinstance(n, ast.Assert)]
            calls = [name_of(n.func) for n in ast.walk(f) if isinstance(n, ast.Call)]
            checks = any("assert" in c or c.endswith(("raises", "check", "expect", "fail", "warns")) for c in calls)
            if not asserts and not checks:
                weak.append(f"{short(path, f.lineno)} {f.name} asserts nothing")
            weak += [f"{short(path, a.lineno)} asserts a constant" for a in asserts if isinstance(a.test, ast.Constant)]
    assert not weak, weak


def assert_passes(*command: str) -> None:
    """Run a checker in the checkout; its words are the failure."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


def test_ruff_passes() -> None:
    assert_passes("-m", "ruff", "check", "--no-cache", ".")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_mypy_strict_passes() -> None:
    assert_passes("-m", "mypy")


def test_import_layers_pass() -> None:
    assert_passes("-c", "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))")
