"""A sampled and paid answer as JSON and raw arrays: one form for the wire and for the ledger, and one digest.

Token ids are int32. Log-probabilities are float32, as the engine gives them and as the trainer takes them, so nothing
is rounded on the way. Versions of the weights come in spans, for they change a few times in an answer at most.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sprat.errors import TrustError
from sprat.files.json import canonical_json
from sprat.post.rl.rewards import Response
from sprat.post.rl.rollout import Rollout

_IDS, _FLOATS = "<i4", "<f4"
_ROUTES = {torch.uint8: "|u1", torch.int16: "<i2"}
_ARRAYS = {"prompt_ids": _IDS, "token_ids": _IDS, "logprobs": _FLOATS}
_EPISODE = ("trained", "tool_calls", "tool_errors", "environment_seed")  # of an environment's episodes alone
_OTHERS = {
    "versions",
    "response",
    "routes",
    "importance",
    "sampled_logprobs",
    *_EPISODE,
}  # fields that are neither arrays nor JSON as they are
_PLAIN = [item.name for item in dataclasses.fields(Rollout) if item.name not in _OTHERS | _ARRAYS.keys()]


def pack_rollout(rollout: Rollout) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """An answer as JSON and arrays.

    Raises:
        TrustError: it is not whole: see ``unpack_rollout``.
    """
    fields: dict[str, Any] = {name: getattr(rollout, name) for name in _PLAIN}
    spans = [[version, len(list(run))] for version, run in itertools.groupby(rollout.versions)]
    response = dataclasses.asdict(rollout.response)
    if response["finished"]:  # as it is where nothing is said
        del response["finished"]
    fields |= {"versions": spans, "response": response}
    fields |= {name: None if fields[name] is None else float(fields[name]) + 0.0 for name in ("reward", "score")}
    if rollout.trained is not None:
        turns = [list(span) for span in rollout.trained]
        fields["episode"] = [turns, rollout.tool_calls, rollout.tool_errors, rollout.environment_seed]
    arrays: dict[str, NDArray[Any]] = {
        name: np.asarray(getattr(rollout, name), dtype) for name, dtype in _ARRAYS.items()
    }
    if rollout.routes is not None:
        arrays["routes"] = rollout.routes.contiguous().numpy().astype(_ROUTES[rollout.routes.dtype], copy=False)
    _check(fields, arrays)
    return fields, arrays


def unpack_rollout(fields: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Rollout:
    """The answer of ``pack_rollout``.

    Raises:
        TrustError: a field is missing, of another type or not finite, or lengths differ.
    """
    _check(fields, arrays)
    routes = torch.from_numpy(np.array(arrays["routes"])) if "routes" in arrays else None
    episode: dict[str, Any] = {}
    if "episode" in fields:
        turns, *counts = fields["episode"]
        episode = dict(zip(_EPISODE, ([(first, count) for first, count in turns], *counts), strict=True))
    return Rollout(
        **{name: fields[name] for name in _PLAIN},
        prompt_ids=arrays["prompt_ids"].tolist(),
        token_ids=arrays["token_ids"].tolist(),
        logprobs=arrays["logprobs"].tolist(),
        response=Response(**fields["response"]),
        versions=[version for version, count in fields["versions"] for _ in range(count)],
        routes=routes,
        **episode,
    )


def _check(fields: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Raise TrustError where an answer is not whole."""
    where = f"group {fields.get('group')!r:.20}, answer {fields.get('sample')!r:.20}"
    if fields.keys() - {"episode"} != {*_PLAIN, "versions", "response"} or arrays.keys() - {"routes"} != _ARRAYS.keys():
        raise _refused("its fields are not those of an answer", where)
    for name, dtype in _ARRAYS.items():
        if arrays[name].dtype != np.dtype(dtype) or arrays[name].ndim != 1:
            raise _refused(f"{name} is no row of {dtype}", where)
    prompt, tokens = len(arrays["prompt_ids"]), len(arrays["token_ids"])
    if not prompt or not tokens or len(arrays["logprobs"]) != tokens:
        raise _refused(f"{prompt} + {tokens} tokens, {len(arrays['logprobs'])} log-probabilities", where)
    spans = fields["versions"]
    sound = isinstance(spans, list) and all(isinstance(span, list) and len(span) == 2 for span in spans)
    if not sound or not all(type(n) is int and n >= 0 for span in spans for n in span):
        raise _refused("the versions of its tokens are no spans", where)
    if sum(count for _, count in spans) != tokens:
        raise _refused("its tokens and their versions differ in number", where)
    if "episode" in fields and not _is_episode(fields["episode"], tokens):
        raise _refused("its turns are no parts of it", where)
    if "routes" in arrays and (arrays["routes"].ndim != 3 or len(arrays["routes"]) != prompt + tokens):
        raise _refused("its routes are not those of its tokens", where)
    if not np.isfinite(arrays["logprobs"]).all() or min(arrays["prompt_ids"].min(), arrays["token_ids"].min()) < 0:
        raise _refused("a log-probability is not finite, or an id below 0", where)
    for name, may_miss in (("reward", True), ("score", False)):
        value = fields[name]
        if not (may_miss and value is None) and (type(value) not in (int, float) or not math.isfinite(value)):
            raise _refused(f"its {name} is {value!r:.40}", where)


def _is_episode(value: Any, tokens: int) -> bool:
    """Whether ``value`` is turns, each behind the one before and all within ``tokens``, and three counts."""
    if not isinstance(value, list) or len(value) != 4 or not isinstance(value[0], list):
        return False
    turns, *counts = value
    if not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
        return False
    if not all(type(n) is int and n >= 0 for n in (*counts, *(n for turn in turns for n in turn))):
        return False
    places = [edge for first, count in turns for edge in (first, first + count)]
    return places == sorted(places) and (not places or places[-1] <= tokens)


def _refused(fault: str, where: str) -> TrustError:
    return TrustError(f"a sampled answer is not whole: {fault}", where=where, todo="sample it again, or report it")


def digest_rollouts(rollouts: Iterable[Rollout]) -> str:
    """SHA-256 (hex) of answers in their order: of all that is trained on, and all that is measured.

    Two lists have one digest where they are the same to the bit.
    """
    sha = hashlib.sha256()
    for rollout in rollouts:
        fields, arrays = pack_rollout(rollout)
        sha.update(canonical_json(fields).encode())
        for name in sorted(arrays):
            sha.update(f"\n{name} {arrays[name].shape}\n".encode())
            sha.update(np.ascontiguousarray(arrays[name]).data)
    return sha.hexdigest()


def check_group(rollouts: Sequence[Rollout], group: int, size: int) -> None:
    """Refuse answers that are not all those of ``group``, once each and in order.

    Raises:
        TrustError: they are not.
    """
    places = [(rollout.group, rollout.sample) for rollout in rollouts]
    if places != [(group, sample) for sample in range(size)]:
        raise _refused(f"{len(rollouts)} answers are not the {size} of the group", f"group {group}")
