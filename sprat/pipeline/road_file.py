"""A file of stages, read and checked whole: stations, keys, names, what waits for what, and every file that is named.

A road of the user's stands in a file of theirs, where paths are relative to it. Those that come with Sprat (``zero``,
``r1``: ``sprat/recipes/roads``) are of any model and data: they have inputs, which the command line names, and so may
the user's own. What a road says once its inputs are named and its settings changed is kept in its folder as
``road.toml``, which can be gone again by itself.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from sprat.config import load
from sprat.config.base import override
from sprat.config.road import InputConfig, InputName, RoadConfig
from sprat.errors import ConfigError
from sprat.pipeline.recipe import RECIPE_FOLDER
from sprat.pipeline.stations import STATIONS
from sprat.post.rl.reward_sources import is_command

ROAD_FOLDER = RECIPE_FOLDER / "roads"
INPUT_NAMES: tuple[str, ...] = get_args(InputName)
_Stages = list[dict[str, Any]]


@dataclass(frozen=True)
class RoadFile:
    """A file of stages, its inputs named and its settings changed.

    Attributes:
        path: where it stands; paths in it are relative to its folder.
        jobs: stages side by side; None: as many as ever could.
        stages: its tables.
        is_changed: whether it is another than what stands at ``path``.
    """

    path: Path
    jobs: int | None
    stages: _Stages
    is_changed: bool

    def to_toml(self, folder: Path) -> str:
        """What is gone, as a file in ``folder``; paths are relative to that."""
        import tomli_w

        names = [table.get("name") for table in self.stages]

        def moved(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: each if key in ("name", "uses", "set") else moved(each) for key, each in value.items()}
            if isinstance(value, (list, tuple)):
                return [moved(each) for each in value]
            if not isinstance(value, str) or value in names or not value:
                return value
            path = _absolute(value, self.path.parent)
            return os.path.relpath(path, folder) if os.path.isabs(path) else value

        jobs = {} if self.jobs is None else {"jobs": self.jobs}
        return tomli_w.dumps({**jobs, "stages": [moved(table) for table in self.stages]})


def open_road(name: str | Path, inputs: Mapping[str, Any] | None = None, overrides: Sequence[str] = ()) -> RoadFile:
    """The road in the file ``name``, or the packaged one where no such file is.

    Args:
        inputs: what the command line names, by name; see ``config.road.InputName``. Paths are those of the process.
        overrides: ``STAGE.KEY=VALUE``, of a stage's keys or settings, or ``KEY=VALUE``, of every stage that has it.

    Raises:
        ConfigError: no such file, an input that it lacks or does not take, a stage or a key that there is not.
    """
    packaged = {path.stem: path for path in ROAD_FOLDER.glob("*.toml")}
    path = packaged[str(name)] if str(name) in packaged and not Path(name).exists() else Path(name)
    config = load(RoadConfig, path)
    given = {key: _absolute(value) for key, value in (inputs or {}).items() if value is not None}
    values = _resolve_inputs(config.inputs, given, str(path))
    _check_files(given, [str(table.get("name")) for table in config.stages], path.parent)
    if unknown := [table["unless"] for table in config.stages if table.get("unless", "model") not in INPUT_NAMES]:
        todo = f"inputs may be called {', '.join(INPUT_NAMES)}"
        raise ConfigError(f"unless = {unknown[0]!r} is no input", where=str(path), todo=todo)
    stages = [_fill(table, values) for table in config.stages if table.get("unless") not in given]
    for table in stages:
        table.pop("unless", None)
    for item in overrides:
        stages = _override(stages, item)
    return RoadFile(path, config.jobs, stages, bool(config.inputs or overrides))


def _absolute(value: Any, base: str | Path = "") -> Any:
    """A path from ``base`` that holds from anywhere, also of ``file.py:function``; what is no path there as it is."""
    if not isinstance(value, (str, Path)):
        return value
    file, colon, rest = str(value).partition(".py:")
    path = os.path.join(base, os.path.expanduser(f"{file}.py" if colon else str(value)))
    if not os.path.exists(path):
        return str(value)
    return os.path.abspath(path) + (f":{rest}" if colon else "")


def _check_files(given: Mapping[str, Any], names: Sequence[str], base: Path) -> None:
    """See that each file that the command line names is there: what a stage says of it later is of the road's folder.

    Raises:
        ConfigError: one is not, and no stage of ``names`` is called so.
    """
    for key in ("data", "examples", "general", "reward"):
        value = str(given.get(key, ""))
        file, colon, _ = value.partition(".py:")
        if not value or value in names or (key == "reward" and (not colon or is_command(value))):
            continue
        name = f"{file}.py" if colon else value
        if not os.path.exists(base / Path(name).expanduser()):
            todo = f"give a path that holds from {os.getcwd()}"
            raise ConfigError(f"no such file or folder {name!r}", where=f"--{key}", todo=todo)


def _resolve_inputs(known: Mapping[Any, InputConfig], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The value of each input that has one.

    Raises:
        ConfigError: see ``open_road``.
    """
    if others := [name for name in given if name not in known]:
        todo = f"it takes {', '.join(f'--{name}' for name in known)}" if known else "write it into the file"
        raise ConfigError(f"this road takes no --{others[0]}", where=where, todo=todo)
    values = dict(given)
    for name, each in known.items():
        if name in values or each.optional:
            continue
        if not each.default:
            raise ConfigError(f"--{name} is missing", where=where, todo=f"name it: --{name} {name.upper()}")
        values[name] = _fill({"": each.default}, values).get("", "")
    return values


def _fill(table: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """``table`` with the values of inputs in the place of their names; keys whose input has none are left out."""
    filled = dict[str, Any]()
    for key, value in table.items():
        name = value[1:-1] if isinstance(value, str) and value.startswith("{") and value.endswith("}") else None
        if isinstance(value, dict):
            filled[key] = _fill(value, values)
        elif name not in INPUT_NAMES:
            filled[key] = value
        elif name in values:
            filled[key] = values[name]
    return filled


def _override(stages: _Stages, item: str) -> _Stages:
    """``stages`` with one override, of the stage that it names, or of each that has the key.

    Raises:
        ConfigError: there is neither.
    """
    name, dot, rest = item.partition(".")
    names = [str(table.get("name")) for table in stages]
    if dot and name in names:
        return [_set(table, rest, item) if table.get("name") == name else table for table in stages]
    key = _first_key(item)
    if not any(_has_key(table, key) for table in stages):
        todo = f"write STAGE.KEY=VALUE; the stages are {', '.join(names)}"
        raise ConfigError(f"no stage, and no stage's key, is called {key!r}", where=f"--set {item}", todo=todo)
    return [_set(table, item, item) if _has_key(table, key) else table for table in stages]


def _set(table: dict[str, Any], item: str, whole: str) -> dict[str, Any]:
    """A stage with one override, of a key of its own or else of its settings."""
    key = _first_key(item)
    if key in ("name", "uses"):
        raise ConfigError(f"{key!r} is what a stage is", where=f"--set {whole}", todo="write a road of your own")
    is_table = key in ("set", "map", "held_out") or "." not in item.partition("=")[0]
    if is_table and _is_own(table, key):
        return override(table, [item])
    return {**table, "set": override(table.get("set", {}), [item])}


def _first_key(item: str) -> str:
    """The ``a`` of ``a.b=c``."""
    return item.partition("=")[0].partition(".")[0].strip()


def _is_own(table: Mapping[str, Any], key: str) -> bool:
    station = STATIONS.get(str(table.get("uses")))
    return station is not None and key in station.stage.model_fields


def _has_key(table: Mapping[str, Any], key: str) -> bool:
    station = STATIONS.get(str(table.get("uses")))
    return station is not None and (
        _is_own(table, key) or any(key in settings.model_fields for settings in station.settings)
    )
