"""Our tokenizer as the metadata of a GGUF file: ``tokenizer`` read backwards, for byte-level BPE.

A GGUF file names how text is cut before bytes are merged and does not hold it, so the name must be found. What counts
is behavior: a cut is taken when it gives the same pieces as the tokenizer's own, on every string of up to three of the
characters that patterns tell apart, and on lines of real text. Then the metadata are read back as ``read_tokenizer``
reads them, and the ids must be the same.

Ids beyond the tokenizer's are filled with unused tokens: llama.cpp takes the number of tokens for the size of the
embedding.
"""

from __future__ import annotations

import functools
import itertools
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sprat.errors import CheckpointError
from sprat.formats.gguf.header import Header, Value, Values
from sprat.formats.gguf.pretokenizers import IGNORE_MERGES, PRETOKENIZERS, normalizer, pre_tokenizer
from sprat.formats.gguf.tokenizer import CONTROL, KEY, NORMAL, SAMPLING, SAMPLING_NAMES, UNUSED, USER, read_tokenizer
from sprat.tokens import Tokenizer
from sprat.tokens.chat_formats import special_token

if TYPE_CHECKING:
    import tokenizers

_CHARACTERS = "aZ\u0301字か한1²'.,+_ \t\n\r\u00a0🙂"  # of each class that patterns tell apart
PROBES = (
    "Hello, world! It's 2024-12-31; they'LL pay 1,234,567.89 € (or $5).",
    "  leading,\ttabs\n\n\nand lines \r\n  trailing  ",
    "naïve café — “quotes” 你好，世界 こんにちは 안녕 Привет, мир! مرحبا नमस्ते ไทย 🙂👩‍👩‍👧",
    "for (int i = 0; i < n; ++i) { x[i] += y_i * 3.14e-2; } // it's a->b::c\n\treturn x != NULL;",
    "12345 + 678 - 9 * 10 / 2 = ?\n3+4+5=12 and 3 + 4 - 5 = 2",
    "https://example.org/a?b=c&d=%20#e  e-mail: a.b@c.de\nCafe\u0301 ΑΒΓ ß ﬁ",
)


def tokenizer_keys(tokenizer: Tokenizer, vocab_size: int, *, pre: str | None = None) -> dict[str, Value | Values]:
    """The keys of ``tokenizer`` for a model of ``vocab_size`` ids; its chat template and sampling among them.

    Args:
        pre: see ``export.save``; with a name given, ids that differ are counted in a warning and not refused.

    Raises:
        CheckpointError: it is no byte-level BPE, has more ids than the model, or no cut is known that is its own.
    """
    files = tokenizer.files()
    table: dict[str, Any] = json.loads(files["tokenizer.json"])
    config: dict[str, Any] = json.loads(files.get("tokenizer_config.json", "{}"))
    kind = str(table["model"].get("type"))
    if kind != "BPE" or table["model"].get("byte_fallback") or '"ByteLevel"' not in json.dumps(table.get("decoder")):
        what = f"the tokenizer is {kind} with byte fallback" if kind == "BPE" else f"the tokenizer is {kind}"
        raise _fault(f"{what}, and only byte-level BPE can be written", "save it as a folder")
    if tokenizer.vocab_size > vocab_size:
        fault = f"the tokenizer has {tokenizer.vocab_size} ids, the model only {vocab_size}"
        raise _fault(fault, "use the tokenizer that the model was trained with")
    keys: dict[str, Value | Values] = {f"{KEY}model": "gpt2", f"{KEY}pre": "", **_tokens(table, vocab_size)}
    keys |= _special_ids(tokenizer, table, config)
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {row.get("name"): row.get("template") for row in template if isinstance(row, dict)}
        template = named.get("default")
    if isinstance(template, str) and template:
        keys["tokenizer.chat_template"] = template
    for name, ours in SAMPLING_NAMES.items():
        if ours in tokenizer.generation_config.default_sampling:
            value = tokenizer.generation_config.default_sampling[ours]
            keys[SAMPLING + name] = int(value) if name == "top_k" else float(value)
    if pre is not None and pre not in PRETOKENIZERS:
        raise _fault(f"the cut {pre!r} is not known", f"use one of {', '.join(PRETOKENIZERS)}")
    keys[f"{KEY}pre"] = pre or find_pre(files["tokenizer.json"])
    _compare_ids(tokenizer, keys, strict=pre is None)
    return keys


def _tokens(table: dict[str, Any], vocab_size: int) -> dict[str, Value | Values]:
    """Tokens by id, their types, and the merges."""
    tokens, types = [f"[PAD{index}]" for index in range(vocab_size)], [UNUSED] * vocab_size
    for token, index in table["model"]["vocab"].items():
        tokens[index], types[index] = token, NORMAL
    for row in table["added_tokens"]:
        content = row["content"]
        steers = row.get("special") or (content[:2] in ("<|", "<｜") and content[-2:] in ("|>", "｜>"))
        tokens[row["id"]], types[row["id"]] = content, CONTROL if steers else USER
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in table["model"]["merges"]]
    return {f"{KEY}tokens": tokens, f"{KEY}token_type": types, f"{KEY}merges": merges}


def _special_ids(tokenizer: Tokenizer, table: dict[str, Any], config: dict[str, Any]) -> dict[str, Value | Values]:
    """Ids of special tokens, and whether a text begins with one."""
    ids = {token: index for token, index in table["model"]["vocab"].items()}
    ids |= {row["content"]: row["id"] for row in table["added_tokens"]}
    special = tokenizer.special_ids
    turns = [*sorted(tokenizer.eos_token_ids - {special.eos}), -1, -1]
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
    nearest = 'give pre="superbpe", which is nearest for tokenizers that Sprat trained, if some other ids will do'
    raise _fault(what, f"{nearest}, or save it as a folder")


def _pieces(tokenizer: tokenizers.Tokenizer, text: str) -> list[str]:
    """What ``text`` is cut into, bytes as letters."""
    normalized: str = text if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is None:
        return [normalized]
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normalized)]


def _compare_ids(tokenizer: Tokenizer, keys: dict[str, Value | Values], *, strict: bool) -> None:
    """Read ``keys`` back and compare the ids of the probes: refuse what differs, or where not ``strict`` warn of it."""
    again = read_tokenizer(Header(Path("the file to be written"), keys, {}))
    differing = [probe for probe in PROBES if again.encode(probe) != tokenizer.encode(probe)]
    if not differing:
        return
    what = f"with the cut {keys[f'{KEY}pre']!r} other ids come out for {len(differing)} of {len(PROBES)} probes"
    if strict:
        raise _fault(f"{what}, {differing[0]!r} for one", "save it as a folder")
    warnings.warn(f"{what}: llama.cpp will read such text otherwise than the model was taught", stacklevel=4)


def _fault(what: str, todo: str) -> CheckpointError:
    return CheckpointError(what, where="tokenizer", todo=todo)
