"""What a model folder says beside config.json: how the tokenizer is set up, and how answers are sampled and end.

Files: tokenizer_config.json, special_tokens_map.json (older folders name the special tokens only there), the chat
template in any of its places, added_tokens.json, and generation_config.json. What is understood is listed here; what is
not, and would change an answer, is named in a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sprat.errors import DataError
from sprat.files.json import load_json_object

log = logging.getLogger(__name__)
GENERATION_CONFIG_FILE = "generation_config.json"
# read beside tokenizer.json and tokenizer_config.json, before what these say
SIDE_FILES = ("special_tokens_map.json", "added_tokens.json", "chat_template.json", "chat_template.jinja")
# Keys of generation_config.json that become settings of ``Sampling``,
# and what each may say, from the lowest on; those in OPEN_LOWER_BOUND not the lowest itself.
# A top_k of -1 is vLLM's way to keep all tokens.
SAMPLING_RANGES = {
    "temperature": (0, 100),
    "top_k": (0, 2**31 - 1),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0, 100),
}
OPEN_LOWER_BOUND = ("top_p", "repetition_penalty")
# Keys that are read elsewhere (ids of special tokens, which the tokenizer knows), or say nothing about an answer
IGNORED_KEYS = (
    "bos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "transformers_version",
    "use_cache",
    "max_length",
)
# What each further key says by default, and then asks for nothing (transformers' GenerationConfig)
NEUTRAL_VALUES: dict[str, Any] = {
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
class GenerationConfig:
    """What generation_config.json says.

    Attributes:
        eos_token_ids: ids that end an answer.
        default_sampling: settings of ``Sampling`` for a caller who says none.
        raw: the whole file, as it was.
    """

    eos_token_ids: tuple[int, ...] = ()
    default_sampling: Mapping[str, float] = field(default_factory=dict)
    raw: Mapping[str, Any] = field(default_factory=dict)


def load_generation_config(folder: Path) -> GenerationConfig:
    """Read the generation_config.json of ``folder``; what is not understood is named in a warning.

    ``do_sample: false`` means greedy, whatever else stands there, as in transformers.

    Raises:
        DataError: it is no JSON object, or a value that we would use is no number, or out of range.
    """
    file = folder / GENERATION_CONFIG_FILE
    return parse_generation_config(_read_json_object(file), str(file))


def parse_generation_config(table: Mapping[str, Any], where: str) -> GenerationConfig:
    """What ``raw`` says with the keys of generation_config.json; see ``load_generation_config``."""
    ids = table.get("eos_token_id")
    eos_token_ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
    sampling = {key: table[key] for key in SAMPLING_RANGES if table.get(key) is not None}
    if sampling.get("top_k") == -1:
        sampling["top_k"] = 0
    if table.get("do_sample") is False:
        sampling |= {"temperature": 0.0}
    for key, value in [("eos_token_id", token_id) for token_id in eos_token_ids] + list(sampling.items()):
        types = int if key in ("eos_token_id", "top_k") else (int, float)
        invalid = isinstance(value, bool) or not isinstance(value, types)
        if not invalid and key in SAMPLING_RANGES:
            low, high = SAMPLING_RANGES[key]
            invalid = not low <= value <= high or (key in OPEN_LOWER_BOUND and value == low)
        if invalid:
            raise DataError(f"{key} cannot be {value!r}", where=where, todo="correct it, or leave it out")
    understood = {"eos_token_id", "do_sample", *SAMPLING_RANGES, *IGNORED_KEYS}
    asking = {key for key, value in table.items() if value not in (None, False, NEUTRAL_VALUES.get(key))}
    if unknown := sorted(key for key in asking - understood if key[0] != "_"):
        log.warning("%s: not understood and not followed: %s", where, ", ".join(unknown))
    return GenerationConfig(tuple(eos_token_ids), sampling, table)


def load_tokenizer_config(folder: Path) -> dict[str, Any]:
    """The tokenizer_config.json of ``folder``, with what its neighbours add.

    A template in a file of its own goes before the one inside, as in transformers.

    Raises:
        DataError: a file is no JSON object.
    """
    table = _read_json_object(folder / "tokenizer_config.json")
    for key, value in _read_json_object(folder / "special_tokens_map.json").items():
        if table.get(key) is None:
            table[key] = value
    added = _read_json_object(folder / "added_tokens.json")
    if added:
        listed = {str(index): {"content": content} for content, index in added.items()}
        table["added_tokens_decoder"] = {**listed, **(table.get("added_tokens_decoder") or {})}
    template = _read_json_object(folder / "chat_template.json").get("chat_template")
    try:
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    except ValueError as error:
        where = str(folder / "chat_template.jinja")
        raise DataError(f"not UTF-8: {error}", where=where, todo="copy the file again") from None
    return table | ({"chat_template": template} if template else {})


def _read_json_object(file: Path) -> dict[str, Any]:
    """A JSON object; an empty one where the file is missing."""
    try:
        return load_json_object(file, DataError, problem="not JSON", todo="copy the file again")
    except FileNotFoundError:
        return {}
