"""Frozen, typed configs: one TOML file in, one resolved TOML file out.

``load`` reads a recipe, applies ``a.b=c`` overrides and validates. An unknown key is an error that
names the key that was meant, because a silently ignored key is the most expensive kind of typo; so is a key that an
older version had.
"""

from __future__ import annotations

import copy
import difflib
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)
from pydantic_core import ErrorDetails

from sprat.errors import ConfigError
from sprat.files import digest

LENIENT = {"lenient": True}  # the context of a validation that takes "5" for 5, as pydantic does


class Config(BaseModel):
    """Base of every config: frozen, no unknown keys, one canonical digest."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    removed_keys: ClassVar[Mapping[str, str]] = {}  # keys of older recipes that had no effect: what counts instead
    moved_keys: ClassVar[Mapping[str, str]] = {}  # keys of before: the name now, or "" for a table that is this one now

    @field_validator("*", mode="wrap")
    @classmethod
    def _check_type(cls, value: Any, read: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        """Refuse a text or a truth value where a number is asked for, and the reverse; ``parse`` may allow it."""
        result = read(value)
        if info.context is LENIENT:
            return result
        pairs = zip(value, result, strict=True) if isinstance(result, tuple) else [(value, result)]
        for raw, parsed in pairs:
            is_bool = isinstance(parsed, bool)
            if isinstance(parsed, (int, float)) and (isinstance(raw, str) or isinstance(raw, bool) != is_bool):
                expected = "true or false" if is_bool else "a number"
                raise ValueError(f"{expected} is asked for, not {json.dumps(raw, default=repr)}")
        return result

    def digest(self) -> str:
        """SHA-256 (hex) over the canonical JSON of this config."""
        return digest.of_json(self.model_dump(mode="json"))

    def replace(self, **changes: Any) -> Self:
        """A copy with ``changes``, validated again."""
        return type(self).model_validate({**self.model_dump(), **changes})

    def to_toml(self) -> str:
        """This config as TOML; keys whose value is None are left out."""
        import tomli_w

        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))


C = TypeVar("C", bound=Config)

# What other trainers call a key -> what it is called here.
SYNONYMS = {
    "lr": ("muon_lr", "adam_lr"),
    **dict.fromkeys(("learning_rate", "rate", "max_lr", "peak_lr"), ("muon_lr", "adam_lr", "lr")),
    **dict.fromkeys(("batch_size", "bs", "per_device_train_batch_size"), ("batch_rows", "prompts_per_step")),
    **dict.fromkeys(("max_steps", "num_steps", "iterations", "iters", "total_steps", "train_steps"), ("steps",)),
    **dict.fromkeys(("gradient_accumulation_steps", "grad_accum", "accumulation_steps"), ("micro_batches",)),
    **dict.fromkeys(("max_grad_norm", "gradient_clipping", "clip_grad", "clip_grad_norm"), ("grad_clip",)),
    **dict.fromkeys(("warmup", "warmup_iters", "num_warmup_steps", "warmup_ratio"), ("warmup_steps",)),
    **dict.fromkeys(("save_steps", "save_every", "ckpt_interval", "checkpoint_interval"), ("checkpoint_every",)),
    **dict.fromkeys(("logging_steps", "log_interval", "eval_every"), ("log_every",)),
    **dict.fromkeys(("block_size", "context_length", "max_seq_len", "max_length", "sequence_length"), ("seq_len",)),
    **dict.fromkeys(("num_generations", "n_samples", "rollouts"), ("group_size",)),
    **dict.fromkeys(("beta", "kl_coef", "kl_beta"), ("kl_weight",)),
    **dict.fromkeys(("max_new_tokens", "max_completion_length"), ("max_tokens",)),
    **dict.fromkeys(("resume_from", "resume", "resume_from_checkpoint", "checkpoint"), ("init_from",)),
    **dict.fromkeys(("wd", "decay", "l2"), ("weight_decay",)),
    **dict.fromkeys(("optimizer", "optimiser"), ("optim",)),
    **dict.fromkeys(("random_seed", "manual_seed"), ("seed", "seeds")),
    **dict.fromkeys(("num_threads", "workers", "num_workers", "threads"), ("jobs",)),
}


Fault = tuple[str, str]  # what is wrong, and what to do


def load(config_class: type[C], path: str | Path, overrides: Iterable[str] = ()) -> C:
    """Read a TOML recipe of type ``config_class`` and apply ``a.b=value`` overrides.

    Raises:
        ConfigError: the file is missing or no TOML, a key is unknown, or a value does not fit.
    """
    path = Path(path)
    try:
        if not path.exists():
            raise ConfigError("no such recipe", where=str(path), todo="give the path of a TOML file")
        if not path.is_file():  # to read a pipe or a device may take for ever
            raise ConfigError("the recipe is no file", where=str(path), todo="give the path of a TOML file")
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"the recipe is not valid TOML: {error}", where=str(path), todo="mend that line") from None
    except (OSError, ValueError, RecursionError) as error:  # a name that no file can have, no right to read it
        what = f"cannot read the recipe: {getattr(error, 'strerror', None) or error}"
        raise ConfigError(what, where=ascii(str(path))[:200], todo="give the path of a TOML file") from None
    return _parse(config_class, table, tuple(overrides), str(path), None)


def override(table: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """``table`` with each ``a.b=value`` set; ``value`` is read as TOML, else as a plain string.

    An entry of a list goes by its number, from 0.

    >>> override({"rl": {"steps": 1}, "tasks": [{"name": "sums"}]}, ["rl.steps=20", "name=tiny", "tasks.0.name=gcd"])
    {'rl': {'steps': 20}, 'tasks': [{'name': 'gcd'}], 'name': 'tiny'}

    Raises:
        ConfigError: an override is none, or goes through a value that has no parts, or beyond the end of a list.
    """
    result: dict[str, Any] = copy.deepcopy(table)
    for item in overrides:
        key, sign, text = item.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f"cannot read the override {item!r}", where="--set", todo="write it as key.sub=value")
        try:
            read = tomllib.loads(f"v = {text}")
        except tomllib.TOMLDecodeError:
            read = {"v": text}
        if set(read) != {"v"}:
            todo = "give each key a --set of its own"
            raise ConfigError(f"an override of more than one key: {item!r}", where="--set", todo=todo)
        *parents, last = key.strip().split(".")
        table_or_list: dict[str, Any] | list[Any] = result
        for parent, below in zip(parents, [*parents, last][1:], strict=True):
            if isinstance(table_or_list, dict) and parent not in table_or_list:
                if below.isdigit():
                    what, todo = f"there is no list {parent!r} in the recipe", f"give the whole of it: {parent}=[...]"
                    raise ConfigError(what, where=f"--set {item}", todo=todo)
                table_or_list[parent] = {}
            table_or_list = table_or_list[_key_of(table_or_list, parent, item)]
            if not isinstance(table_or_list, dict | list):
                raise ConfigError(f"{parent!r} is a value, not a table", where=f"--set {item}", todo="name a table")
        table_or_list[_key_of(table_or_list, last, item)] = read["v"]
    return result


def _key_of(table_or_list: dict[str, Any] | list[Any], key: str, item: str) -> Any:
    """What ``table_or_list`` knows its part ``key`` by."""
    if isinstance(table_or_list, dict):
        return key
    numbers = [str(number) for number in range(len(table_or_list))]
    if key not in numbers:
        what, todo = f"{key!r} is no entry of a list of {len(table_or_list)}", "name an entry by its number, from 0"
        raise ConfigError(what, where=f"--set {item}", todo=todo)
    return numbers.index(key)


def merge_tables(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes``, tables in it key by key.

    >>> merge_tables({"optim": {"lr": 1, "name": "adamw"}}, {"optim": {"lr": 2}, "steps": 3})
    {'optim': {'lr': 2, 'name': 'adamw'}, 'steps': 3}
    """
    both = [key for key, value in changes.items() if isinstance(value, dict) and isinstance(base.get(key), dict)]
    return base | changes | {key: merge_tables(base[key], changes[key]) for key in both}


def parse(
    config_class: type[C],
    table: dict[str, Any],
    *,
    where: str,
    lenient: bool = False,
    overrides: Iterable[str] = (),
) -> C:
    """Validate ``table`` with ``overrides`` as ``config_class``; the first fault becomes one sentence.

    Args:
        lenient: whether "5" may be a number, and 1 a truth value, as other people's files have it.

    Raises:
        ConfigError: see ``load``.
    """
    return _parse(config_class, table, tuple(overrides), where, LENIENT if lenient else None)


def _parse(config_class: type[C], table: dict[str, Any], overrides: tuple[str, ...], where: str, context: Any) -> C:
    """``table`` with ``overrides``, validated; a fault is that override's with which it comes, else ``where``'s."""
    try:
        return config_class.model_validate(override(table, overrides), context=context)
    except ValidationError:
        states = [table, *(override(table, overrides[: count + 1]) for count in range(len(overrides)))]
    faults = [_faults(config_class, state, context) for state in states]
    count, first = next((n, here) for n, state in enumerate(faults) if (here := [f for f in state if f in faults[-1]]))
    (what, todo), moves = first[0], list(_moves(config_class, states[-1]))
    if moves:  # all of them in one sentence
        what, todo = ", ".join(what for what, _ in first), " and ".join(dict.fromkeys(todo for _, todo in first))
    if count:
        where = f"--set {overrides[count - 1]}"
        key, _, value = overrides[count - 1].partition("=")
        for old, new in moves:  # the outer ones first
            if key.startswith(old) or (f"{key}." == old and not old.startswith(new)):
                todo = f"write {(new + f'{key}.'.removeprefix(old))[:-1]}={value}"
    raise ConfigError(what, where=where, todo=todo)


def _faults(config_class: type[BaseModel], table: dict[str, Any], context: Any) -> list[Fault]:
    """All that is wrong with ``table``; where keys of it have moved, only those."""
    try:
        config_class.model_validate(table, context=context)
    except ValidationError as error:
        moved = [_moved_key_fault(old, new) for old, new in _moves(config_class, table)]
        return moved or [_fault(config_class, one) for one in error.errors()]
    except ConfigError:  # all keys and values hold, but not together
        pass
    return []


def _moves(config_class: Any, table: Any, old: str = "", new: str = "") -> Iterator[tuple[str, str]]:
    """Each key of ``table`` that stands elsewhere or is called otherwise now, dotted: what it was, and what it is.

    A dot ends both, so that a key in a table that has moved begins with what the table was.
    """
    for key, value in table.items() if isinstance(table, dict) and config_class else ():
        name = getattr(config_class, "moved_keys", {}).get(key, key)
        place = f"{new}{name}." if name else new
        if name != key:
            yield f"{old}{key}.", place
        yield from _moves(_table_class(config_class, (name,) if name else ()), value, f"{old}{key}.", place)


def _moved_key_fault(old: str, new: str) -> Fault:
    if old.startswith(new):
        table = f"into [{new[:-1]}]" if new else "without it"
        return f"the key {old[:-1]!r} is gone: write its keys {table}", "move them there"
    return f"the key {old[:-1]!r} is now called {new[:-1]!r}", "rename it"


def _fault(config_class: type[BaseModel], error: ErrorDetails) -> Fault:
    """The fault of a value, or of an unknown key, with what was meant: a key of its table, or of one below it."""
    path = error["loc"]
    key = ".".join(map(str, path))
    if error["type"] != "extra_forbidden":
        return f"{key or config_class.__name__}: {error['msg']}", "correct the value"
    name, table = str(path[-1]), _table_class(config_class, path[:-1])
    if name in getattr(table, "removed_keys", {}):
        return f"the key {key!r} is gone: {table.removed_keys[name]}", "remove it"
    todo = f"there are {', '.join(table.model_fields)}" if table is not None else "remove it"
    if suggestions := _suggest_keys(name, [] if table is None else list(_dotted_keys(table))):
        todo = f"perhaps you mean {' or '.join(map(repr, suggestions))}"
    return f"unknown key {key!r}", todo


def _suggest_keys(name: str, keys: list[str]) -> list[str]:
    """Which dotted ``keys`` are called ``name`` or mean the same, else which look most like it: at most three."""
    names = {name, *SYNONYMS.get(name.lower().replace("-", "_"), ())}
    matches = [key for key in keys if key.rpartition(".")[2] in names]
    if not matches:
        key_names = {key.rpartition(".")[2] for key in keys}
        close = difflib.get_close_matches(name, sorted(key_names), n=1, cutoff=0.7)
        matches = [key for key in keys if key.rpartition(".")[2] in close]
    return sorted(matches, key=lambda key: key.count("."))[:3]


def _dotted_keys(config_class: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The keys of ``config_class`` and, dotted, those of the tables in it."""
    for name in config_class.model_fields:
        yield f"{prefix}{name}"
        nested = _table_class(config_class, (name,))
        if nested is not None:
            yield from _dotted_keys(nested, f"{prefix}{name}.")


def _table_class(config_class: type[BaseModel], path: tuple[int | str, ...]) -> Any:
    """The class of the table at ``path`` inside ``config_class``; None where a value stands."""
    for part in path:
        if isinstance(part, int):
            continue
        if part not in config_class.model_fields:
            return None
        annotation = config_class.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        nested = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not nested:
            return None
        config_class = nested[0]
    return config_class
