"""Which files a user's reward is made of: they are inputs of the run, so that a changed reward is another run."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from sprat.errors import ConfigError
from sprat.tasks.source_files import source_files


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
    files = source_files(root_file)
    return {"reward" if path == root_file else f"reward/{name}": path for path, name in files.items()}


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
