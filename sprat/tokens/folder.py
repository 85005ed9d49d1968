"""What a model folder says beside config.json: how the tokenizer is set up, and how answers are sampled and end.

Files: tokenizer_config.json, special_tokens_map.json (older folders name the special tokens only there), the chat
template in any of its places, added_tokens.json, and generation_config.json. What is understood is listed here; what is
not, and would change an answer, is named in a warning.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sprat.errors import DataError

log = logging.getLogger(__name__)
GENERATION = "generation_config.json"
# Keys of generation_config.json that become settings of ``Sampling``
SETTINGS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# What each may say, from the lowest on; those in OPEN not the lowest itself. -1 is vLLM's way to keep all tokens.
RANGES = {
    "temperature": (0, 100),
    "top_k": (0, 2**31 - 1),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0, 100),
}
OPEN = ("top_p", "repetition_penalty")
# Keys that are read elsewhere (ids of special tokens, which the tokenizer knows), or say nothing about an answer
SILENT = ("bos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version", "use_cache", "max_length")
# What each further key says by default, and then asks for nothing (transformers' GenerationConfig)
NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "min_length": 0,
    "diversity_penalty": 0.0,
    "trust_remote_code": False,
}


@dataclass(frozen=True)
class Generation:
    """What generation_config.json says.

    Attributes:
        ends: ids that end an answer.
        settings: settings of ``Sampling`` for a caller who says none.
        table: the whole file, as it was.
    """

    ends: tuple[int, ...] = ()
    settings: Mapping[str, float] = field(default_factory=dict)
    table: Mapping[str, Any] = field(default_factory=dict)


def generation(folder: Path) -> Generation:
    """Read the generation_config.json of ``folder``; what is not understood is named in a warning.

    ``do_sample: false`` means greedy, whatever else stands there, as in transformers.

    Raises:
        DataError: it is no JSON object, or a value that we would use is no number, or out of range.
    """
    file = folder / GENERATION
    return understood(_table(file), str(file))


def understood(table: Mapping[str, Any], where: str) -> Generation:
    """What ``table`` says with the keys of generation_config.json; see ``generation``."""
    ends = table.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    settings = {key: table[key] for key in SETTINGS if table.get(key) is not None}
    if settings.get("top_k") == -1:
        settings["top_k"] = 0
    if table.get("do_sample") is False:
        settings |= {"temperature": 0.0}
    for key, value in [("eos_token_id", one) for one in ends] + list(settings.items()):
        kinds = int if key in ("eos_token_id", "top_k") else (int, float)
        wrong = isinstance(value, bool) or not isinstance(value, kinds)
        if not wrong and key in RANGES:
            low, high = RANGES[key]
            wrong = not low <= value <= high or (key in OPEN and value == low)
        if wrong:
            raise DataError(f"{key} cannot be {value!r}", where=where, todo="correct it, or leave it out")
    known = {"eos_token_id", "do_sample", *SETTINGS, *SILENT}
    asked = {key for key, value in table.items() if value not in (None, False, NEUTRAL.get(key)) and key[0] != "_"}
    if strange := sorted(asked - known):
        log.warning("%s: not understood and not followed: %s", where, ", ".join(strange))
    return Generation(tuple(ends), settings, table)


def settings(folder: Path) -> dict[str, Any]:
    """The tokenizer_config.json of ``folder``, with what its neighbours add.

    A template in a file of its own goes before the one inside, as in transformers.

    Raises:
        DataError: a file is no JSON object.
    """
    table = _table(folder / "tokenizer_config.json")
    for key, value in _table(folder / "special_tokens_map.json").items():
        if table.get(key) is None:
            table[key] = value
    added = _table(folder / "added_tokens.json")
    if added:
        listed = {str(index): {"content": content} for content, index in added.items()}
        table["added_tokens_decoder"] = {**listed, **(table.get("added_tokens_decoder") or {})}
    template = _table(folder / "chat_template.json").get("chat_template")
    try:
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    except ValueError as error:
        where = str(folder / "chat_template.jinja")
        raise DataError(f"not UTF-8: {error}", where=where, todo="copy the file again") from None
    return table | ({"chat_template": template} if template else {})


def _table(file: Path) -> dict[str, Any]:
    """A JSON object; an empty one where the file is missing."""
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DataError(f"not JSON: {error}", where=str(file), todo="copy the file again") from None
    if not isinstance(table, dict):
        raise DataError("not a JSON object", where=str(file), todo="copy the file again")
    return table
