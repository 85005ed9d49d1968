"""Which files a user's own Python is made of: a run of it is another run when one of them changes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path


def source_files(root_file: Path) -> dict[Path, str]:
    """``root_file`` and what it imports from its own folder, and so on, each with its name within that folder.

    What lies elsewhere (installed packages, the folder above) is not listed, nor what is imported by a computed name.
    """
    folder, files, queue = root_file.parent, {root_file: root_file.name}, [root_file]
    package = _package(folder.resolve())
    if package and root_file.name != "__init__.py":
        queue.append(folder / "__init__.py")
        files[folder / "__init__.py"] = "__init__.py"
    while queue:
        for path in _imports(queue.pop(), folder, package):
            if path not in files:
                files[path] = path.relative_to(folder).as_posix()
                queue.append(path)
    return files


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
