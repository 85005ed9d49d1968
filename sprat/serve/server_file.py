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

Names are those of ``ServeConfig``. What is said on the command line counts more than what the file says.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sprat.errors import ServeError

MODEL_KEYS = {"model", "served_model_name", "served_model_aliases", "adapters"}


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


def read_server_file(path: Path) -> tuple[dict[str, Any], list[ModelSource]]:
    """Settings of ``ServeConfig`` (and ``api_key_file``), and the models: the first from the top of the file.

    Raises:
        ServeError: there is no such file, it is no TOML, or a model has no folder or a key that is none of a model's.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ServeError("no such file", where=str(path), todo="give a TOML file with --config") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ServeError(f"cannot read the server's file: {error}", where=str(path), todo="mend the file") from None
    rows = table.pop("models", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ServeError("models is no list of tables", where=str(path), todo="write each as [[models]]")
    first = {key: table.pop(key) for key in ("model", "adapters") if key in table}
    if first:
        names = {key: table.pop(key) for key in ("served_model_name", "served_model_aliases") if key in table}
        rows = [first | names, *rows]
    return table, [_source(row, path) for row in rows]


def _source(row: Mapping[str, Any], path: Path) -> ModelSource:
    unknown = ", ".join(sorted(set(row) - MODEL_KEYS))
    if unknown:
        raise ServeError(
            f"a model has no {unknown}", where=str(path), todo=f"there are {', '.join(sorted(MODEL_KEYS))}"
        )
    adapters = row.get("adapters", {})
    if not isinstance(row.get("model"), str) or not isinstance(adapters, dict):
        raise ServeError("a model has no folder", where=str(path), todo='write model = "FOLDER"')
    name, aliases = row.get("served_model_name"), row.get("served_model_aliases", [])
    names = tuple(str(each) for each in ([name] if name else []) + list(aliases))
    return ModelSource(Path(row["model"]), names, {str(key): Path(value) for key, value in adapters.items()})
