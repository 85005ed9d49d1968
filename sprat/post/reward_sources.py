"""Which files a user's reward is made of: they are inputs of the run, so that a changed reward is another run."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from sprat.errors import ConfigError


def sources(name: str) -> dict[str, Path]:
    """The files of the reward ``name``: its own, and what it imports from its own folder, and so on.

    What lies elsewhere (installed packages, the folder above) is not listed, nor what is imported by a computed name.

    Returns:
        ``reward`` for its own file, ``reward/OTHER.py`` for each of the others, as inputs of a run.

    Raises:
        ConfigError: there is no such module or file.
    """
    source, _ = parts(name)
    if source.endswith(".py"):
        first = Path(source)
        if not first.is_file():
            raise ConfigError(f"no such file {source!r}", where=f"reward {name}", todo="give the path of a Python file")
    else:
        try:
            spec = importlib.util.find_spec(source)
        except ModuleNotFoundError:
            spec = None
        if spec is None:
            raise ConfigError(f"no module {source!r}", where=f"reward {name}", todo="install it or give a Python file")
        if not spec.has_location or spec.origin is None:
            return {}  # built into the interpreter
        first = Path(spec.origin)
    folder, files, waiting = first.parent, {first: "reward"}, [first]
    package = _package(folder.resolve())
    if package and first.name != "__init__.py":
        waiting.append(folder / "__init__.py")
        files[folder / "__init__.py"] = "reward/__init__.py"
    while waiting:
        for path in _imports(waiting.pop(), folder, package):
            if path not in files:
                files[path] = f"reward/{path.relative_to(folder).as_posix()}"
                waiting.append(path)
    return {key: path for path, key in files.items()}


def _package(folder: Path) -> str:
    """The dotted name of ``folder`` as a package; empty where it is none."""
    steps: list[str] = []
    while (folder / "__init__.py").is_file():
        steps.insert(0, folder.name)
        folder = folder.parent
    return ".".join(steps)


def _imports(path: Path, folder: Path, package: str) -> Iterator[Path]:
    """Files under ``folder`` that the Python file ``path`` imports; ``package`` is what ``folder`` is called."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names, start = [alias.name for alias in node.names], folder
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            names = [base, *(f"{base}.{alias.name}".lstrip(".") for alias in node.names)]
            start = folder if not node.level else path.parents[node.level - 1]
        else:
            continue
        for each in names:
            inner = each.removeprefix(package).lstrip(".") if package and f"{each}.".startswith(f"{package}.") else each
            steps = [part for part in inner.split(".") if part]
            for depth in range(1, len(steps) + 1):  # a package runs its __init__ before its modules
                target = start.joinpath(*steps[:depth])
                for found in (target.with_name(f"{target.name}.py"), target / "__init__.py"):
                    if found.is_file() and found.is_relative_to(folder):
                        yield found


def parts(name: str) -> tuple[str, str]:
    """Module or file, and function, of the reward ``name``.

    Raises:
        ConfigError: it is not written as both with a colon between.
    """
    source, colon, attribute = name.rpartition(":")
    if not colon or not source or not attribute:
        todo = "write module:function or file.py:function"
        raise ConfigError(f"cannot read the reward {name!r}", where="reward", todo=todo)
    return source, attribute
