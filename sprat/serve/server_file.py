"""A server in a file: what ``sprat serve`` takes as options, as TOML, and models beside the first.

    model = "smol"
    host = "0.0.0.0"
    api_key_file = "/etc/sprat/keys"
    max_num_seqs = 32

    [adapters]
    support = "runs/support/artefact/adapter"

    [[models]]
    model = "runs/quickstart/quantize"
    served_model_name = "reasoner"

Names are those of the options or, where they differ, of ``ServeConfig``. What is said on the command line counts more
than what the file says; a model that is given there takes the place of the one at the top of the file.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sprat.errors import ServeError
from sprat.serve.config import ServeConfig

MODEL_KEYS = {"model", "served_model_name", "served_model_aliases", "adapters"}
OPTION_NAMES = {
    "name": "served_model_name",
    "api_key": "api_keys",
    "allowed_host": "allowed_hosts",
    "adapter": "adapters",
    "shutdown_timeout": "shutdown_timeout_seconds",
    "engine_iteration_timeout": "engine_iteration_timeout_seconds",
    "turns": "max_history_turns",
}  # what an option is called → the setting
LISTS = {"api_keys", "allowed_hosts", "allowed_origins", "served_model_aliases", "examples"}  # of strings


@dataclass(frozen=True)
class ModelSource:
    """A model that is served.

    Attributes:
        folder: what ``sprat.load`` takes.
        names: what requests may name it; empty: the folder's name.
        adapters: name → folder of LoRA adapters beside it.
    """

    folder: Path
    names: tuple[str, ...] = ()
    adapters: Mapping[str, Path] = field(default_factory=dict)

    @property
    def served_names(self) -> tuple[str, ...]:
        """Its names, one at least."""
        return self.names or (self.folder.resolve().name,)


@dataclass(frozen=True)
class ServerFile:
    """What a server's file says.

    Attributes:
        settings: of ``ServeConfig``, and ``api_key_file``.
        model, names, adapters: of the model at the top of the file, which may be given on the command line instead.
        others: the models beside it.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    model: Path | None = None
    names: tuple[str, ...] = ()
    adapters: Mapping[str, Path] = field(default_factory=dict)
    others: tuple[ModelSource, ...] = ()

    def sources(self, model: Path | None, names: tuple[str, ...], adapters: Mapping[str, Path]) -> list[ModelSource]:
        """All models, the first with what the command line says of it.

        Raises:
            ServeError: there is no model, or names and adapters of none.
        """
        is_replaced = model is not None and self.model is not None
        first = model or self.model
        if not is_replaced:
            names, adapters = names or self.names, {**self.adapters, **adapters}
        if first is not None:
            return [ModelSource(first, names, adapters), *self.others]
        if names or adapters:
            raise ServeError("names and adapters are of no model", where="sprat serve", todo="give the model as well")
        if not self.others:
            raise ServeError("no model to serve", where="sprat serve", todo="give one, or a file with --config")
        return list(self.others)


def read_server_file(path: Path) -> ServerFile:
    """The settings and the models of a file.

    Raises:
        ServeError: there is no such file, it is no TOML, a setting is unknown or does not hold, or a model has no
            folder or a key that is none of a model's.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ServeError("no such file", where=str(path), todo="give a TOML file with --config") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ServeError(f"cannot read the server's file: {reason}", where=str(path), todo="mend the file") from None
    rows = table.pop("models", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ServeError("models is no list of tables", where=str(path), todo="write each as [[models]]")
    table = _renamed(table, path)
    top = {key: table.pop(key) for key in sorted(MODEL_KEYS) if key in table}
    _check_settings(table, path)
    model, names, adapters = _read_model(top, path)
    others = []
    for row in rows:
        folder, *_ = read = _read_model(_renamed(row, path), path)
        if folder is None:
            raise ServeError("a model has no folder", where=str(path), todo='write model = "FOLDER"')
        others.append(ModelSource(folder, read[1], read[2]))
    return ServerFile(table, model, names, adapters, tuple(others))


def _renamed(row: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """``row`` by the names of the settings, with one string where a list may stand as a list of one."""
    table: dict[str, Any] = {}
    for key, value in row.items():
        name = key.replace("-", "_")
        name = OPTION_NAMES.get(name, name)
        if name in table:
            raise ServeError(f"{name} is said twice", where=str(path), todo=f"leave out {key}")
        if name in LISTS:
            value = [value] if isinstance(value, str) else value
            if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
                raise ServeError(f"{key} is no list of strings", where=str(path), todo=f'write {key} = ["…"]')
        table[name] = value
    return table


def _check_settings(table: Mapping[str, Any], path: Path) -> None:
    """Raise ServeError, which names the file, where a setting is unknown or does not hold."""
    known = set(ServeConfig.model_fields) | {"api_key_file"} | MODEL_KEYS
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            todo = f"did you mean {near[0]}?" if near else "sprat serve --help lists what there is"
            raise ServeError(f"there is no setting {key!r}", where=str(path), todo=todo)
    for key in ("prices", "api_key_file"):
        if not isinstance(table.get(key, ""), str):
            raise ServeError(f"{key} is no string", where=str(path), todo=f'write {key} = "…"')
    others = {"prices", "api_key_file", "ssl_keyfile", "ssl_ca_certs"}  # the last two may go with an option
    try:
        ServeConfig(**{key: value for key, value in table.items() if key not in others})
    except ServeError as error:
        raise ServeError(error.what, where=str(path), todo=error.todo) from None


def _read_model(row: Mapping[str, Any], path: Path) -> tuple[Path | None, tuple[str, ...], dict[str, Path]]:
    """Folder, names and adapters of a model."""
    unknown = ", ".join(sorted(set(row) - MODEL_KEYS))
    if unknown:
        raise ServeError(
            f"a model has no {unknown}", where=str(path), todo=f"there are {', '.join(sorted(MODEL_KEYS))}"
        )
    folder, adapters, names = row.get("model"), row.get("adapters", {}), row.get("served_model_name", [])
    if folder is not None and (not isinstance(folder, str) or not folder):
        raise ServeError("a model has no folder", where=str(path), todo='write model = "FOLDER"')
    if not isinstance(adapters, dict) or not all(isinstance(each, str) and each for each in adapters.values()):
        raise ServeError(
            "adapters is no table of folders", where=str(path), todo='write [adapters] and NAME = "FOLDER"'
        )
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ServeError("served_model_name is no name", where=str(path), todo='write served_model_name = "NAME"')
    all_names = (*names, *row.get("served_model_aliases", []))
    return Path(folder) if folder else None, all_names, {key: Path(value) for key, value in adapters.items()}
