"""Our tokenizer as the metadata of a GGUF file: ``tokenizer`` read backwards.

SentencePiece BPE with byte fallback (``llama``) is its tokens and their scores. For byte-level BPE (``gpt2``) a file
names how text is cut before bytes are merged and does not hold it, so the name must be found. What counts is behavior:
a cut is taken when it gives the same pieces as the tokenizer's own, on every string of up to three of the characters
that patterns tell apart, and on lines of real text. Then the metadata are read back as ``read_tokenizer`` reads them,
and the ids must be the same.

Ids beyond the tokenizer's are filled with unused tokens: llama.cpp takes the number of tokens for the size of the
embedding.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sprat.errors import CheckpointError
from sprat.formats.gguf.header import Header, Value, Values
from sprat.formats.gguf.pretokenizers import IGNORE_MERGES, PRETOKENIZERS, normalizer, pre_tokenizer
from sprat.formats.gguf.tokenizer import (
    BYTE,
    CONTROL,
    KEY,
    NORMAL,
    SAMPLING,
    SAMPLING_NAMES,
    UNKNOWN,
    UNUSED,
    USER,
    read_tokenizer,
)
from sprat.tokens import Tokenizer
from sprat.tokens.chat_formats import special_token

if TYPE_CHECKING:
    import tokenizers

_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
_CHARACTERS = "aZ\u0301字か한1²'.,+_ \t\n\r\u00a0🙂"  # of each class that patterns tell apart
PROBES = (
    "Hello, world! It's 2024-12-31; they'LL pay 1,234,567.89 € (or $5).",
    "  leading,\ttabs\n\n\nand lines \r\n  trailing  ",
    "naïve café — “quotes” 你好，世界 こんにちは 안녕 Привет, мир! مرحبا नमस्ते ไทย 🙂👩‍👩‍👧",
    "for (int i = 0; i < n; ++i) { x[i] += y_i * 3.14e-2; } // it's a->b::c\n\treturn x != NULL;",
    "12345 + 678 - 9 * 10 / 2 = ?\n3+4+5=12 and 3 + 4 - 5 = 2",
    "https://example.org/a?b=c&d=%20#e  e-mail: a.b@c.de\nCafe\u0301 ΑΒΓ ß ﬁ",
)


def tokenizer_keys(
    tokenizer: Tokenizer, vocab_size: int, *, eos_token_ids: Collection[int] = (), pre: str | None = None
) -> dict[str, Value | Values]:
    """The keys of ``tokenizer`` for a model of ``vocab_size`` ids; its chat template and sampling among them.

    Args:
        eos_token_ids: that the model's config names; those that are control tokens count beside the tokenizer's own.
        pre: see ``export.save``; with a name given, ids that differ are counted in a warning and not refused.

    Raises:
        CheckpointError: it is no BPE, has more ids than the model, or other ids would come out of the file.
    """
    files = tokenizer.files()
    table: dict[str, Any] = json.loads(files["tokenizer.json"])
    table["added_tokens"] = table.get("added_tokens") or []
    config: dict[str, Any] = json.loads(files.get("tokenizer_config.json", "{}"))
    if (kind := table["model"].get("type")) != "BPE":
        raise _fault(f"the tokenizer is {kind}, and only BPE can be written", "save it as a folder")
    if tokenizer.vocab_size > vocab_size:
        fault = f"the tokenizer has {tokenizer.vocab_size} ids, the model only {vocab_size}"
        raise _fault(fault, "use the tokenizer that the model was trained with")
    ends = sorted((tokenizer.eos_token_ids | tokenizer.control_ids & {*eos_token_ids}) - {tokenizer.special_ids.eos})
    if len(ends) > 2:
        warnings.warn(f"a file names three tokens that end an answer; left out: {ends[2:]}", stacklevel=3)
    keys = {**_special_ids(tokenizer, table, config, ends), **_instruct_keys(tokenizer, config)}
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in table["model"]["merges"]]
    tokens, types = _tokens(tokenizer, table, vocab_size)
    keys |= {f"{KEY}tokens": tokens, f"{KEY}token_type": types}
    if table["model"].get("byte_fallback"):
        return _sentence_piece(tokenizer, keys, tokens, merges)
    if not merges:
        raise _fault(
            "the tokenizer has no merges, and llama.cpp makes tokens of bytes by merges alone", "save it as a folder"
        )
    if pre is not None and pre not in PRETOKENIZERS:
        raise _fault(f"the cut {pre!r} is not known", f"use one of {', '.join(PRETOKENIZERS)}")
    keys |= {f"{KEY}model": "gpt2", f"{KEY}pre": pre or find_pre(files["tokenizer.json"])}
    keys[f"{KEY}merges"] = [" ".join(merge) for merge in merges]
    if differing := _differing(tokenizer, keys):
        what = f"with the cut {keys[f'{KEY}pre']!r} other ids come out for {len(differing)} of {len(PROBES)} probes"
        if pre is None:
            raise _fault(f"{what}, {differing[0]!r} for one", "save it as a folder")
        warnings.warn(f"{what}: llama.cpp will read such text otherwise than the model was taught", stacklevel=3)
    return keys


def _sentence_piece(
    tokenizer: Tokenizer, keys: dict[str, Value | Values], tokens: list[str], merges: list[tuple[str, ...]]
) -> dict[str, Value | Values]:
    """``keys`` with scores: a token's is the better the earlier it is merged; with a space before a text, or without.

    Raises:
        CheckpointError: neither gives the tokenizer's own ids.
    """
    rank: dict[str, int] = {}
    for merge in merges:
        rank.setdefault("".join(merge), len(rank))
    scores = [-float(rank.get(token, len(rank))) for token in tokens]
    keys |= {f"{KEY}model": "llama", f"{KEY}pre": "default", f"{KEY}scores": scores}
    for prefix in (True, False):
        candidate = keys | {f"{KEY}add_space_prefix": prefix}
        if not (differing := _differing(tokenizer, candidate)):
            return candidate
    what = f"llama.cpp would make other ids of {differing[0]!r} than this tokenizer does"
    raise _fault(what, "save it as a folder")


def _tokens(tokenizer: Tokenizer, table: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Tokens by id, and their types."""
    tokens, types = [f"[PAD{index}]" for index in range(vocab_size)], [UNUSED] * vocab_size
    fallback, unknown = table["model"].get("byte_fallback"), table["model"].get("unk_token")
    for token, index in table["model"]["vocab"].items():
        is_byte = fallback and _BYTE_TOKEN.fullmatch(token)
        steers = CONTROL if index in tokenizer.control_ids else NORMAL
        tokens[index], types[index] = token, BYTE if is_byte else steers
    for row in table["added_tokens"]:
        content = row["content"]
        steers = row.get("special") or (content[:2] in ("<|", "<｜") and content[-2:] in ("|>", "｜>"))
        kind = UNKNOWN if fallback and content == unknown else CONTROL if steers else USER
        tokens[row["id"]], types[row["id"]] = content, kind
    return tokens, types


def _instruct_keys(tokenizer: Tokenizer, config: dict[str, Any]) -> dict[str, Value | Values]:
    """The chat template and the sampling."""
    keys: dict[str, Value | Values] = {}
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {row.get("name"): row.get("template") for row in template if isinstance(row, dict)}
        template = named.get("default")
    if isinstance(template, str) and template:
        keys["tokenizer.chat_template"] = template
    sampling = tokenizer.generation_config.default_sampling
    for name, ours in SAMPLING_NAMES.items():
        if ours in sampling:
            keys[SAMPLING + name] = int(sampling[ours]) if name == "top_k" else float(sampling[ours])
    return keys


def _special_ids(
    tokenizer: Tokenizer, table: dict[str, Any], config: dict[str, Any], ends: list[int]
) -> dict[str, Value | Values]:
    """Ids of special tokens, ``ends`` of turns and messages among them, and whether a text begins with one."""
    ids = {token: index for token, index in table["model"]["vocab"].items()}
    ids |= {row["content"]: row["id"] for row in table["added_tokens"]}
    special = tokenizer.special_ids
    turns = [*ends, -1, -1]
    named = {name: ids.get(special_token(config, f"{name}_token"), -1) for name in ("bos", "unk", "pad")}
    bos = special.bos if special.bos >= 0 else named["bos"]
    values = {
        "bos": bos, "eos": special.eos, "eot": turns[0], "eom": turns[1], "unknown": named["unk"],
        "padding": named["pad"],
    }  # fmt: skip
    keys: dict[str, Value | Values] = {f"{KEY}{name}_token_id": index for name, index in values.items() if index >= 0}
    begins = config.get("add_bos_token")
    if not isinstance(begins, bool):
        import tokenizers

        encoded = tokenizers.Tokenizer.from_str(json.dumps(table)).encode("a", add_special_tokens=True).ids
        begins = encoded[:1] == [bos]
    return keys | {f"{KEY}add_bos_token": begins}


@functools.lru_cache(maxsize=2)  # a model is often written in several kinds
def find_pre(text: str) -> str:
    """llama.cpp's name of a cut that gives the same pieces as the tokenizer.json ``text``.

    Raises:
        CheckpointError: none does.
    """
    import tokenizers

    own = tokenizers.Tokenizer.from_str(text)
    whole_first = bool(json.loads(text)["model"].get("ignore_merges"))
    probes = [*PROBES, *map("".join, itertools.product(_CHARACTERS, repeat=3))]
    bare = json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []})
    seen: list[Any] = []
    for pre in PRETOKENIZERS:
        behavior = (PRETOKENIZERS[pre], normalizer(pre), pre in IGNORE_MERGES)
        if behavior in seen or (pre in IGNORE_MERGES) != whole_first:
            continue
        seen.append(behavior)
        parts = {"normalizer": normalizer(pre), "pre_tokenizer": pre_tokenizer(pre)}
        candidate = tokenizers.Tokenizer.from_str(json.dumps({**json.loads(bare), **parts}))
        if all(_pieces(candidate, probe) == _pieces(own, probe) for probe in probes):
            return pre
    what = "llama.cpp knows no pre-tokenizer that cuts text as this tokenizer does"
    nearest = "give --pre superbpe, which is nearest for tokenizers that Sprat trained, if some other ids will do"
    raise _fault(what, f"{nearest}, or save it as a folder")


def _pieces(tokenizer: tokenizers.Tokenizer, text: str) -> list[str]:
    """What ``text`` is cut into, bytes as letters."""
    normalized: str = text if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is None:
        return [normalized]
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normalized)]


def _differing(tokenizer: Tokenizer, keys: dict[str, Value | Values]) -> list[str]:
    """The probes that have other ids when ``keys`` are read back."""
    again = read_tokenizer(Header(Path("the file to be written"), keys, {}))
    return [probe for probe in PROBES if again.encode(probe) != tokenizer.encode(probe)]


def _fault(what: str, todo: str) -> CheckpointError:
    return CheckpointError(what, where="tokenizer", todo=todo)
