"""How our own tokenizer is made: byte-level BPE in which a number is a thing of its own.

Byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909, section 3.2) merges the most frequent
neighbours again and again, so the pieces are those of the training text. For arithmetic that is
harmful: "12" would be one piece after a space and two after a bracket, and 117 might be one token
where 118 is three. A small model then learns each spelling as if it were another number.

Three steps mend it:

1.  Digits are cut out of the text first, in groups of up to three (`\\p{N}{1,3}`), so that a number
    never shares a token with a letter, a sign or the space before it.
2.  Training sees every digit run as a lone "0", so it spends no merge on digits. Instead we lay in the
    merges that make 0 … numbers-1 single tokens, whatever the text was. BPE applies merges by rank and
    not from the left, so "110" may meet (1,10) before (11,0): both are laid in, and both give "110".
3.  A sign keeps the space that stands between it and a number: "3 + 4" is ["3", " + ", "4"]. Prose
    seldom has such signs, so a page of sums is added to the training text.

What is left out: numbers from ``numbers`` on are cut by merge rank (256 is "25","6", but 213 is
"2","13"), which is learnable but uneven; and a normaliser, because decode(encode(x)) == x must hold.
The result is an ordinary tokenizer.json: nothing in it needs our code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from sprat.errors import ConfigError
from sprat.tokens.chat_formats import SPRAT_SPECIAL_TOKENS

NUMBER_PATTERN = r"\p{N}{1,3}"
WORD_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)"  # English endings
    r"| ?[\p{L}\p{M}]+"  # a word with the space before it
    r"| ?[^\s\p{L}\p{M}\p{N}]+ (?![\s\S])"  # a sign before a number keeps both of its spaces
    r"| ?[^\s\p{L}\p{M}\p{N}]+"  # signs
    r"|\s+(?!\S)|\s+"  # blanks; the last one before a word belongs to the word
)
_DIGITS = re.compile(r"[0-9]+")
_ARITHMETIC_LINES = "0 + 0 - 0 * 0 / 0 = 0\n" * 20  # seen as often as a common word
_ARITHMETIC_REPEATS = 1000


def train_tokenizer_json(texts: Iterable[str], vocab_size: int, *, numbers: int) -> str:
    """The tokenizer.json (as text) of a byte-level BPE trained on ``texts``.

    Args:
        texts: documents; read once.
        vocab_size: upper bound of the vocabulary, specials included; text too small to fill it gives fewer.
        numbers: 0 … numbers-1 become single tokens (at most 1000).

    Raises:
        ConfigError: ``vocab_size`` cannot hold the specials, the 256 bytes and the numbers.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    if not 0 <= numbers <= 1000:
        raise ConfigError(f"{numbers} numbers asked for", where="numbers", todo="choose 0 to 1000")
    num_extra = max(0, numbers - 10)
    min_vocab_size = len(SPRAT_SPECIAL_TOKENS) + 256 + num_extra
    if vocab_size < min_vocab_size:
        what = f"a vocabulary of {vocab_size} is too small"
        raise ConfigError(what, where="vocab_size", todo=f"give {min_vocab_size} or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(NUMBER_PATTERN), "isolated"),
            pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - num_extra,
        min_frequency=2,
        show_progress=False,
        special_tokens=list(SPRAT_SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(_mask_numbers(texts), trainer)
    return json.dumps(_add_number_tokens(json.loads(tokenizer.to_str()), numbers), ensure_ascii=False)


def _mask_numbers(texts: Iterable[str]) -> Iterator[str]:
    """``texts`` with each run of digits as one "0", lone surrogates replaced."""
    for _ in range(_ARITHMETIC_REPEATS):
        yield _ARITHMETIC_LINES
    for text in texts:
        yield _DIGITS.sub("0", text.encode("utf-8", "replace").decode("utf-8"))


def _add_number_tokens(table: dict[str, Any], numbers: int) -> dict[str, Any]:
    """Lay the tokens and merges of 10 … numbers-1 into a trained tokenizer.json.

    The ids of the numbers follow those of the bytes in counting order; those learned from text come after.
    """
    model = table["model"]
    learned = sorted(model["vocab"], key=model["vocab"].__getitem__)
    base = len(SPRAT_SPECIAL_TOKENS) + 256
    names = [str(number) for number in range(10, numbers)]
    vocab_order = learned[:base] + names + learned[base:]
    model["vocab"] = {token: index for index, token in enumerate(vocab_order)}
    merges = [[name[:-1], name[-1]] for name in names]
    merges += [[name[0], name[1:]] for name in names if len(name) == 3 and name[1] != "0"]
    model["merges"] = merges + model["merges"]
    return table
