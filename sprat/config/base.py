"""Frozen, typed configs: one TOML file in, one resolved TOML file out.

``load`` reads a recipe, applies ``a.b=c`` overrides and validates. An unknown key is an error that
names the key that was meant, because a silently ignored key is the most expensive kind of typo; so is a key that
an older version had and that never did anything, or that has another name now.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
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

from sprat.errors import ConfigError

LENIENT = {"lenient": True}  # the context of a validation that takes "5" for 5, as pydantic does


class Config(BaseModel):
    """Base of every config: frozen, no unknown keys, one canonical digest."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    gone: ClassVar[Mapping[str, str]] = {}  # keys of older recipes that had no effect: what counts instead

    @field_validator("*", mode="wrap")
    @classmethod
    def _is_of_its_kind(cls, value: Any, read: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        """Refuse a text or a truth value where a number is asked for, and the reverse; ``parse`` may allow it."""
        result = read(value)
        if info.context is LENIENT:
            return result
        pairs = zip(value, result, strict=True) if isinstance(result, tuple) else [(value, result)]
        for given, taken in pairs:
            flag = isinstance(taken, bool)
            if isinstance(taken, (int, float)) and (isinstance(given, str) or isinstance(given, bool) != flag):
                kind = "true or false" if flag else "a number"
                raise ValueError(f"{kind} is asked for, not {json.dumps(given, default=repr)}")
        return result

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

# What other trainers call a key -> what it is called here.
SAME = {
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

# Keys of older recipes -> what they are called now.
RENAMED = {"normalise_std": "normalize_std"}


def load(kind: type[C], path: str | Path, overrides: Iterable[str] = ()) -> C:
    """Read a TOML recipe of type ``kind`` and apply ``a.b=value`` overrides.

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
    return parse(kind, override(table, overrides), where=str(path))


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
        place: dict[str, Any] | list[Any] = result
        for parent, below in zip(parents, [*parents, last][1:], strict=True):
            if isinstance(place, dict) and parent not in place:
                if below.isdigit():
                    what, todo = f"there is no list {parent!r} in the recipe", f"give the whole of it: {parent}=[...]"
                    raise ConfigError(what, where=f"--set {item}", todo=todo)
                place[parent] = {}
            place = place[_part(place, parent, item)]
            if not isinstance(place, dict | list):
                raise ConfigError(f"{parent!r} is a value, not a table", where=f"--set {item}", todo="name a table")
        place[_part(place, last, item)] = read["v"]
    return result


def _part(place: dict[str, Any] | list[Any], key: str, item: str) -> Any:
    """What ``place`` knows its part ``key`` by."""
    if isinstance(place, dict):
        return key
    numbers = [str(number) for number in range(len(place))]
    if key not in numbers:
        what, todo = f"{key!r} is no entry of a list of {len(place)}", "name an entry by its number, from 0"
        raise ConfigError(what, where=f"--set {item}", todo=todo)
    return numbers.index(key)


def parse(kind: type[C], table: dict[str, Any], *, where: str, lenient: bool = False) -> C:
    """Validate ``table`` as ``kind``; the first fault becomes one sentence.

    Args:
        lenient: whether "5" may be a number, and 1 a truth value, as other people's files have it.

    Raises:
        ConfigError: see ``load``.
    """
    try:
        return kind.model_validate(table, context=LENIENT if lenient else None)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise _unknown(kind, first["loc"], where) from None
        raise ConfigError(f"{key or kind.__name__}: {first['msg']}", where=where, todo="correct the value") from None


def _unknown(kind: type[BaseModel], path: tuple[int | str, ...], where: str) -> ConfigError:
    """The fault of an unknown key, with what it was meant to be: a key of its table, or of one below it."""
    *place, name = path
    name, table = str(name), _table(kind, tuple(place))
    key = ".".join(str(part) for part in path)
    if table is not None and name in getattr(table, "gone", {}):
        return ConfigError(f"the key {key!r} is gone: {table.gone[name]}", where=where, todo="remove it")
    if table is not None and RENAMED.get(name) in table.model_fields:
        renamed = ".".join([*map(str, place), RENAMED[name]])
        return ConfigError(f"the key {key!r} is now called {renamed!r}", where=where, todo="rename it")
    near = _meant(name, [] if table is None else list(_leaves(table)))
    if near:
        return ConfigError(f"unknown key {key!r}", where=where, todo=f"did you mean {' or '.join(map(repr, near))}?")
    todo = f"there are {', '.join(table.model_fields)}" if table is not None else "remove it"
    return ConfigError(f"unknown key {key!r}", where=where, todo=todo)


def _meant(name: str, keys: list[str]) -> list[str]:
    """Which dotted ``keys`` are called ``name`` or mean the same, else which look most like it: at most three."""
    words = {name, *SAME.get(name.lower().replace("-", "_"), ())}
    alike = [key for key in keys if key.rpartition(".")[2] in words]
    if not alike:
        last = {key.rpartition(".")[2] for key in keys}
        close = difflib.get_close_matches(name, sorted(last), n=1, cutoff=0.7)
        alike = [key for key in keys if key.rpartition(".")[2] in close]
    return sorted(alike, key=lambda key: key.count("."))[:3]


def _leaves(kind: type[BaseModel], before: str = "") -> Iterator[str]:
    """The keys of ``kind`` and, dotted, those of the tables in it."""
    for name in kind.model_fields:
        yield f"{before}{name}"
        below = _table(kind, (name,))
        if below is not None:
            yield from _leaves(below, f"{before}{name}.")


def _table(kind: type[BaseModel], path: tuple[int | str, ...]) -> Any:
    """The class of the table at ``path`` inside ``kind``; None where a value stands."""
    for part in path:
        if isinstance(part, int):
            continue
        if part not in kind.model_fields:
            return None
        annotation = kind.model_fields[part].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        nested = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not nested:
            return None
        kind = nested[0]
    return kind
