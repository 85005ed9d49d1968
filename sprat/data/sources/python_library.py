"""Text that every machine with Python has: the standard library's code, docstrings and language topics.

Modules are parsed, never run or imported. A file's docstrings make one document and its code without
them another, both of one source, so that they land on the same side of the split.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from sprat.data.document import Document, count_and_bytes, digest_documents
from sprat.data.sources.source import SourceRequest, SourceText
from sprat.data.text_split import MAX_HELD_OUT_DOCUMENT_BYTES, is_held_out_source
from sprat.trust.stage_facts import TextSource

LICENSE = "PSF-2.0"
# Tests, foreign packages, tables rather than text, and what we read in another way.
EXCLUDED_FOLDERS = frozenset(
    ["test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "ensurepip"]
)
DOMAINS = ("docstring", "code")  # of what ``documents`` yields
MAX_FILE_BYTES = 400_000  # bytes; larger files are tables


def read(request: SourceRequest) -> SourceText:
    """As many docstrings and as much code as both sides of the split need; all topics where prose is asked for.

    The library has no file of its own to digest: its record is about what the corpus takes.
    """
    chosen = list(topics()) if "prose" in request.train_bytes else []
    train_bytes = {name: request.train_bytes[name] for name in DOMAINS if name in request.train_bytes}
    for side, accept in ((False, lambda source: not is_held_out_source(source)), (True, is_held_out_source)):
        largest = MAX_HELD_OUT_DOCUMENT_BYTES if side else sys.maxsize
        remaining = {name: request.held_out_bytes if side else size for name, size in train_bytes.items()}
        for document in documents(accept=accept):
            if remaining.get(document.domain, 0) > 0:
                remaining[document.domain] -= min(document.size, largest)
                chosen.append(document)
            if max(remaining.values(), default=0) <= 0:
                break
    return SourceText(chosen, _record)


def _record(sample: Sequence[Document]) -> TextSource:
    """What sources.json says of ``sample``, documents of the library."""
    name = "python {}.{}.{} library".format(*sys.version_info[:3])
    return TextSource(name, LICENSE, *count_and_bytes(sample), digest=digest_documents(sample))


def documents(root: Path | None = None, *, accept: Callable[[str], bool] = lambda source: True) -> Iterator[Document]:
    """Docstrings and code of the library's modules, file by file in an order that mixes its folders.

    Args:
        root: the library's folder; that of the running Python if not given.
        accept: only files whose source ("python/json/decoder.py") it likes are opened.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    for file in _modules(root):
        name = file.relative_to(root).as_posix()
        if accept(f"python/{name}"):
            yield from _read_module(file, name)


def topics(root: Path | None = None) -> Iterator[Document]:
    """The language reference that ``help()`` shows, one document a topic (reStructuredText prose)."""
    root = root or Path(sysconfig.get_path("stdlib"))
    file = root / "pydoc_data" / "topics.py"
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                name, text = getattr(key, "value", None), getattr(value, "value", None)
                if isinstance(name, str) and isinstance(text, str):
                    source = f"python/topics/{name}"
                    yield Document(source, text, source, LICENSE, "prose")


def _modules(root: Path) -> list[Path]:
    """The library's modules in an order that only their names decide."""
    files = []
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in EXCLUDED_FOLDERS]
        for file in (Path(parent, name) for name in names if name.endswith(".py")):
            if file.is_file() and file.stat().st_size <= MAX_FILE_BYTES:
                files.append((hashlib.sha256(file.relative_to(root).as_posix().encode()).digest(), file))
    return [file for _, file in sorted(files)]


def _read_module(file: Path, name: str) -> Iterator[Document]:
    """The docstring document and the code document of one module; nothing if it is no Python."""
    try:
        text = file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
        tree = ast.parse(text)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    source = f"python/{name}"
    docstrings, lines = [], text.split("\n")
    for title, node in _walk(tree, name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")):
        docstring = ast.get_docstring(node, clean=True)
        if docstring and len(docstring) > 20:
            docstrings.append(f"{title}\n\n{docstring}\n")
            first = node.body[0]
            lines[first.lineno - 1 : first.end_lineno] = [""] * ((first.end_lineno or first.lineno) - first.lineno + 1)
    if docstrings:
        yield Document(f"{source}#docstrings", "\n".join(docstrings), source, LICENSE, "docstring")
    code = re.sub(r"\n\s*\n\s*\n+", "\n\n", "\n".join(lines)).strip("\n")
    if code.strip():
        yield Document(f"{source}#code", code + "\n", source, LICENSE, "code")


def _walk(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, title: str
) -> Iterator[tuple[str, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]]:
    """``node`` and the classes and functions in it, in the order of the text, with their titles."""
    yield title, node
    for child in node.body:
        if isinstance(child, ast.ClassDef):
            yield from _walk(child, child.name)
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _walk(child, f"{child.name}({_arguments(child)})")


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The names of a function's arguments."""
    names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
    names += [f"*{node.args.vararg.arg}"] if node.args.vararg else []
    names += [argument.arg for argument in node.args.kwonlyargs]
    return ", ".join(names + ([f"**{node.args.kwarg.arg}"] if node.args.kwarg else []))
