"""JSON: one text for each value, files written at once and read with care, and what of Python JSON can hold."""

from __future__ import annotations

import json
import math
import selectors
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sprat.errors import SpratError, TrustError
from sprat.files import atomic
from sprat.files.regular_file import open_regular_file


def canonical_json(value: Any) -> str:
    """The one JSON text of ``value``: sorted keys, no spaces.

    >>> canonical_json({"b": 1, "a": [True, None]})
    '{"a":[true,null],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def write_json(path: str | Path, content: Any, *, durable: bool = True) -> None:
    """Write ``content`` as indented JSON with sorted keys; see ``atomic.write_bytes``."""
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    # Half a surrogate pair (a file name that is no UTF-8) has no bytes, but JSON has an escape for it.
    atomic.write_bytes(path, (text + "\n").encode("utf-8", "backslashreplace"), durable=durable)


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object at ``path``; None where there is none or it cannot be read, or says a key twice."""
    try:
        with open_regular_file(path) as stream:
            content = json.loads(stream.read(), object_pairs_hook=reject_duplicate_keys)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, TrustError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def load_json_object(path: Path, error_type: type[SpratError], *, problem: str, todo: str) -> dict[str, Any]:
    """The JSON object at ``path``, where other programs write; of a key that stands twice the last one counts.

    Args:
        error_type: of the error where it cannot be read as one.
        problem: how its sentence begins, before the reason.
        todo: how its sentence ends.

    Raises:
        FileNotFoundError: there is none.
        SpratError: of ``error_type``; it is no JSON, or no object, or cannot be read at all.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise error_type(f"{problem}: {error}", where=str(path), todo=todo) from None
    if not isinstance(content, dict):
        raise error_type("not a JSON object", where=str(path), todo=todo)
    return content


def reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are all different: of two alike, readers would choose differently."""
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands in it twice")
    return result


def to_json_value(value: Any) -> Any:
    """``value`` as JSON has it: keys as text, tuples as lists, array scalars as numbers, no NaN."""
    if isinstance(value, Mapping):
        return {str(key): to_json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json_value(item) for item in value]
    if hasattr(value, "tolist"):
        return to_json_value(value.tolist())
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def exchange_json(process: subprocess.Popen[str], request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Send ``request`` as a line of JSON to ``process`` and read the line that it answers within ``seconds``.

    Raises:
        TimeoutError: there is none in time. OSError, ValueError: the process is dead.
    """
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(json.dumps(request) + "\n")
    process.stdin.flush()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(seconds):
            raise TimeoutError
    reply: dict[str, Any] = json.loads(process.stdout.readline())
    return reply
