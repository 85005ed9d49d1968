"""Frozen, typed configs: one TOML file in, one resolved TOML file out.

``load`` reads a recipe, applies ``a.b=c`` overrides and validates. An unknown key is an error that
names the nearest valid one, because a silently ignored key is the most expensive kind of typo.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from sprat.errors import ConfigError


class Config(BaseModel):
    """Base of every config: frozen, no unknown keys, one canonical digest."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    def digest(self) -> str:
        """SHA-256 (hex) over the canonical JSON of this config."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def replace(self, **changes: Any) -> Self:
        """A copy with ``changes``, validated again."""
        return type(self).model_validate({**self.model_dump(), **changes})

    def to_toml(self) -> str:
        """This config as TOML; keys whose value is None are left out."""
        import tomli_w

        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


C = TypeVar("C", bound=Config)


def load(kind: type[C], path: str | Path, overrides: Iterable[str] = ()) -> C:
    """Read a TOML recipe of type ``kind`` and apply ``a.b=value`` overrides.

    Raises:
        ConfigError: the file is missing or no TOML, a key is unknown, or a value does not fit.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("no such recipe", where=str(path), todo="give the path of a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ConfigError(f"the recipe is not valid TOML: {error}", where=str(path), todo="mend that line") from None
    return parse(kind, override(table, overrides), where=str(path))


def override(table: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """``table`` with each ``a.b=value`` set; ``value`` is read as TOML, else as a plain string.

    >>> override({"rl": {"steps": 1}}, ["rl.steps=20", "name=tiny"])
    {'rl': {'steps': 20}, 'name': 'tiny'}
    """
    result: dict[str, Any] = json.loads(json.dumps(table))
    for item in overrides:
        key, sign, text = item.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f"cannot read the override {item!r}", where="--set", todo="write it as key.sub=value")
        try:
            value = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            value = text
        *parents, last = key.strip().split(".")
        place = result
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ConfigError(f"{parent!r} is a value, not a table", where=f"--set {item}", todo="name a table")
        place[last] = value
    return result


def parse(kind: type[C], table: dict[str, Any], *, where: str) -> C:
    """Validate ``table`` as ``kind``; the first fault becomes one sentence.

    Raises:
        ConfigError: see ``load``.
    """
    try:
        return kind.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(
                str(first["loc"][-1]), sorted(_keys(kind, first["loc"][:-1])), n=1, cutoff=0.0
            )
            todo = f"did you mean {near[0]!r}?" if near else "remove it"
            raise ConfigError(f"unknown key {key!r}", where=where, todo=todo) from None
        raise ConfigError(f"{key or kind.__name__}: {first['msg']}", where=where, todo="correct the value") from None


def _keys(kind: type[BaseModel], path: tuple[int | str, ...]) -> set[str]:
    """The valid keys of the table at ``path`` inside ``kind``."""
    for part in path:
        if isinstance(part, int) or part not in kind.model_fields:
            continue
        annotation = kind.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        nested = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not nested:
            return set()
        kind = nested[0]
    return set(kind.model_fields)
