"""What a user names as a reward, and which files that is made of: they are inputs of the run.

``file.py:function`` and ``module:function`` are Python; whatever else is a command, with its arguments.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
from pathlib import Path

from sprat.config.rl import RewardInput
from sprat.errors import ConfigError
from sprat.tasks.source_files import source_files
from sprat.trust.run_record import Input

_PYTHON = re.compile(r"(?:\S.*\.py|[A-Za-z_][\w.]*):[A-Za-z_]\w*")


def is_command(name: str) -> bool:
    """Whether the reward ``name`` is a command, and no function.

    >>> [is_command(name) for name in ("judge.py:f", "my.judges:f", "python judge.py", "./judge --strict")]
    [False, False, True, True]
    """
    return not _PYTHON.fullmatch(name)


def split_command(name: str) -> list[str]:
    """The command and its arguments, as a shell reads them; no shell runs it.

    Raises:
        ConfigError: it cannot be read, or there is no such program.
    """
    where = f"reward {name}"
    try:
        arguments = shlex.split(name)
    except ValueError as error:
        raise ConfigError(f"cannot read the command: {error}", where=where, todo="close its quotes") from None
    if not arguments:
        raise ConfigError("no reward", where="reward", todo="give file.py:function, or a command")
    if shutil.which(arguments[0]) is None:
        todo = "give file.py:function, or a command that can be run"
        if Path(arguments[0]).is_file():
            todo = f"make the file executable (chmod +x), or name what runs it: python {arguments[0]}"
        if arguments[0].endswith(".py") and len(arguments) == 1:
            todo = f"name the function in it, {name}:function, or what runs it: python {name}"
        raise ConfigError(f"no program {arguments[0]!r}", where=where, todo=todo)
    return arguments


def reward_inputs(name: str, key: str = "reward") -> dict[str, Input]:
    """What the reward ``name`` is made of, as inputs of a run under ``key``: how it is called, and its files.

    Of a command those of its words that are files, and what a Python file among them imports from its own folder; of
    programs that is a script below this folder, and none of the machine's.

    Raises:
        ConfigError: there is no such module, file or program.
    """
    files: dict[str, Path] = {}
    if is_command(name):
        words = split_command(name)
        for word in words:
            path = Path(word)
            is_program = word == words[0] and not ("/" in word and path.resolve().is_relative_to(Path.cwd()))
            if path.is_file() and not is_program:
                own = source_files(path) if path.suffix == ".py" else {path: path.name}
                files |= {f"{key}/{place}": file for file, place in own.items()}
    else:
        source, function = split_reward_name(name)
        words = [source, function]
        own_files = reward_files(name)
        files = {
            f"{key}/{Path(source).name}" if place == "reward" else place: path for place, path in own_files.items()
        }
        files = {place.replace("reward/", f"{key}/", 1): path for place, path in files.items()}
    return {key: RewardInput(call=[Path(word).name if "/" in word else word for word in words]), **files}


def reward_files(name: str) -> dict[str, Path]:
    """The files of the Python reward ``name``: its own, and what it imports from its own folder, and so on.

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
        except (Exception, SystemExit) as error:  # the packages around a module are imported to find it
            what = f"looking for {source!r} raised {type(error).__name__}: {error}"
            raise ConfigError(what, where=f"reward {name}", todo="mend its package, or give a Python file") from None
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
