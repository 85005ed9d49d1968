"""Which files a user's reward is made of: they are inputs of the run, so that a changed reward is another run."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from sprat.errors import ConfigError


def reward_files(name: str) -> dict[str, Path]:
    """The files of the reward ``name``: its own, and what it imports from its own folder, and so on.

    What lies elsewhere (installed packages, the folder above) is not listed, nor what is imported by a computed name.

    Returns:
        ``reward`` for its own file, ``reward/OTHER.py`` for each of the others, as inputs of a run.

    Raises:
        ConfigError: there is no such module or file.
    """
    source, _ = split_reward_name(name)
    if source.endswith(".py"):
        root_file = Path(source)
        if not root_file.is_file():
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
        root_file = Path(spec.origin)
    folder, files, queue = root_file.parent, {root_file: "reward"}, [root_file]
    package = _package(folder.resolve())
    if package and root_file.name != "__init__.py":
        queue.append(folder / "__init__.py")
        files[folder / "__init__.py"] = "reward/__init__.py"
    while queue:
        for path in _imports(queue.pop(), folder, package):
            if path not in files:
                files[path] = f"reward/{path.relative_to(folder).as_posix()}"
                queue.append(path)
    return {key: path for path, key in files.items()}


def _package(folder: Path) -> str:
    """The dotted name of ``folder`` as a package; empty where it is none."""
    segments: list[str] = []
    while (folder / "__init__.py").is_file():
        segments.insert(0, folder.name)
        folder = folder.parent
    return ".".join(segments)


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
        for module_name in names:
            in_package = package and f"{module_name}.".startswith(f"{package}.")
            relative_name = module_name.removeprefix(package).lstrip(".") if in_package else module_name
            segments = [segment for segment in relative_name.split(".") if segment]
            for depth in range(1, len(segments) + 1):  # a package runs its __init__ before its modules
                base_path = start.joinpath(*segments[:depth])
                for candidate in (base_path.with_name(f"{base_path.name}.py"), base_path / "__init__.py"):
                    if candidate.is_file() and candidate.is_relative_to(folder):
                        yield candidate


def split_reward_name(name: str) -> tuple[str, str]:
    """Module or file, and function, of the reward ``name``.

    Raises:
        ConfigError: it is not written as both with a colon between.
    """
    source, colon, attribute = name.rpartition(":")
    if not colon or not source or not attribute:
        todo = "write module:function or file.py:function"
        raise ConfigError(f"cannot read the reward {name!r}", where="reward", todo=todo)
    return source, attribute
