"""One face for every tokenizer: ours, DeepSeek's, or any Hugging Face tokenizer.json.

The rule that matters for safety: **text is never a command.** If a user writes ``<|assistant|>`` or
``</think>`` into a question, a plain Hugging Face ``encode`` would give the ids of the real role and
think tokens, and the question could play the assistant. So two tokenizers are built from the same
file: one that knows the added tokens (for our own chat format and for decoding) and one from which the
control tokens have been taken out, which spells such a string in ordinary pieces. Only
``encode(..., specials=True)`` uses the first, and only for text that we wrote ourselves.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sprat.errors import DataError
from sprat.tokens import formats
from sprat.tokens.formats import Format, Specials
from sprat.trust import atomic

if TYPE_CHECKING:
    import tokenizers

BATCH = 1024  # texts that one call hands to the Rust side; bounds memory
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """Text ↔ ids over one tokenizer.json (HF ``tokenizers``). Immutable; safe to share between threads.

    Attributes:
        format: the chat format, recognised by its special tokens.
        ids: ids of the special tokens (-1 where there is none).
        vocab_size: number of ids, added tokens included.
        digest: SHA-256 (hex) of tokenizer.json.
    """

    def __init__(self, text: str, *, config: dict[str, Any] | None = None, where: str = "tokenizer.json") -> None:
        """Build from the text of a tokenizer.json and its tokenizer_config.json, if any.

        Raises:
            DataError: the text is no tokenizer.json, or the tokenizer has no end token.
        """
        import tokenizers

        try:
            table = json.loads(text)
            self._full: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(text)
            self._full.no_padding()
            self._full.no_truncation()
            added: list[dict[str, Any]] = table["added_tokens"] or []
            self._control = {token["content"]: int(token["id"]) for token in added if _is_control(token)}
            table["added_tokens"] = [token for token in added if token["content"] not in self._control]
            table.update(padding=None, truncation=None, post_processor=None)
            self._plain: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(json.dumps(table))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"not a tokenizer: {error}", where=where, todo="give an HF tokenizer.json") from None
        except Exception as error:  # the Rust side raises bare Exception
            todo = "give the tokenizer.json of an HF fast tokenizer"
            raise DataError(f"the tokenizer cannot be read: {error}", where=where, todo=todo) from None
        self._json = text
        self._config = dict(config or {})
        self._byte_level = '"ByteLevel"' in json.dumps(table.get("decoder"))
        self._pieces: dict[str, tuple[int, ...]] = {}
        ids = self._full.get_vocab(with_added_tokens=True).values()
        self.vocab_size: int = 1 + max(ids, default=-1)
        self.digest: str = hashlib.sha256(text.encode("utf-8")).hexdigest()
        self.format: Format = formats.fitted(formats.recognise(self._control), self._config)
        self.ids: Specials = self._specials(where)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, *, numbers: int = 200) -> Tokenizer:
        """Train our own byte-level BPE; deterministic. 0 … numbers-1 are single tokens. See ``training``.

        Raises:
            ConfigError: ``vocab_size`` is too small.
        """
        from sprat.tokens.training import train_json

        return cls(train_json(texts, vocab_size, numbers=numbers))

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a folder that holds tokenizer.json, or that file itself.

        Raises:
            DataError: nothing there, or nothing that is a fast tokenizer.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        config_file = file.with_name("tokenizer_config.json")
        try:
            text = file.read_bytes().decode("utf-8")
            config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
            template = file.with_name("chat_template.jinja")
            if isinstance(config, dict) and template.is_file():
                config.setdefault("chat_template", template.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError("no tokenizer", where=str(file), todo="give a folder with a tokenizer.json") from None
        except ValueError as error:
            raise DataError(f"not JSON: {error}", where=str(file.parent), todo="copy the file again") from None
        return cls(text, config=config if isinstance(config, dict) else {}, where=str(file))

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json (with the chat template) and special_tokens_map.json.

        tokenizer.json keeps its digest. Each file is replaced at once, never half-written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config, names = self._config, {}
        if self.format is formats.OWN:
            names = {"bos_token": self.format.bos, "eos_token": self.format.eos, "pad_token": self.format.pad}
            config = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "clean_up_tokenization_spaces": False,
                "model_max_length": 1_000_000,
                **names,
                "chat_template": formats.OWN_TEMPLATE,
            }
        atomic.write_text(folder / "tokenizer.json", self._json)
        if config:
            atomic.write_text(folder / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2))
        if names:
            atomic.write_text(folder / "special_tokens_map.json", json.dumps(names, indent=2))

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """Ids of ``text``. Without ``specials`` no control token can come out, whatever the text says."""
        if specials:
            ids: list[int] = self._full.encode(_sound(text), add_special_tokens=False).ids
            return ids
        return self._checked(text, self._plain.encode(_sound(text), add_special_tokens=False).ids)

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Ids of each text, as ``encode`` gives them, on all cores."""
        rows: list[list[int]] = []
        waiting = [_sound(text) for text in texts]
        for start in range(0, len(waiting), BATCH):
            part = waiting[start : start + BATCH]
            found = self._plain.encode_batch_fast(part, add_special_tokens=False)
            rows.extend(self._checked(text, one.ids) for text, one in zip(part, found, strict=True))
        return rows

    def decode(self, ids: Sequence[int], *, skip_specials: bool = False) -> str:
        """Text of ``ids``; bytes that are no UTF-8 come out as U+FFFD. ``skip_specials`` leaves out control tokens."""
        row = [int(index) for index in ids]
        if skip_specials:
            control = self.control_ids
            row = [index for index in row if index not in control]
        text: str = self._full.decode(row, skip_special_tokens=False)
        return text

    def token_bytes(self, index: int) -> bytes:
        """The bytes that token ``index`` adds to the text; empty for control tokens and unknown ids."""
        return self._bytes[index] if 0 <= index < len(self._bytes) else b""

    def byte_length(self, ids: Sequence[int]) -> int:
        """How many bytes of text ``ids`` stand for; control tokens count nothing."""
        table = self._bytes
        return sum(len(table[index]) for index in ids)

    def piece(self, text: str) -> tuple[int, ...]:
        """Ids of a string of the chat format (control tokens allowed), remembered."""
        if text not in self._pieces:
            self._pieces[text] = tuple(self.encode(text, specials=True)) if text else ()
        return self._pieces[text]

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids that user text can never produce."""
        return frozenset(self._control.values())

    @cached_property
    def _bytes(self) -> list[bytes]:
        """Bytes of every token, by id."""
        vocab: dict[str, int] = self._full.get_vocab(with_added_tokens=True)
        alphabet = _byte_alphabet()
        table = [b""] * self.vocab_size
        added = {token.content for token in self._full.get_added_tokens_decoder().values()}
        for token, index in vocab.items():
            if token in self._control:
                continue
            if self._byte_level and token not in added and all(char in alphabet for char in token):
                table[index] = bytes(alphabet[char] for char in token)
            elif match := _BYTE_TOKEN.fullmatch(token):
                table[index] = bytes([int(match[1], 16)])
            else:
                table[index] = token.replace("▁", " ").encode("utf-8")
        return table

    def _checked(self, text: str, ids: list[int]) -> list[int]:
        """``ids``, or the ids of ``text`` with every control string cut in two where one came out as a token."""
        if self.control_ids.isdisjoint(ids):
            return ids
        names = [(re.escape(name[0]), re.escape(name[1:])) for name in self._control if len(name) > 1]
        pattern = "|".join(f"(?<={first})(?={rest})" for first, rest in names)
        parts = [self._plain.encode(part, add_special_tokens=False).ids for part in re.split(pattern, text) if part]
        return [index for part in parts for index in part if index not in self.control_ids]

    def _specials(self, where: str) -> Specials:
        """Find the special ids by the names of the format, else by tokenizer_config.json."""
        form, control = self.format, self._control

        def find(name: str, key: str, default: int = -1) -> int:
            declared = self._config.get(key)
            declared = declared.get("content") if isinstance(declared, dict) else declared
            return control.get(name, control.get(str(declared), default))

        eos = find(form.eos, "eos_token")
        if eos < 0:
            todo = "name eos_token in tokenizer_config.json"
            raise DataError("the tokenizer has no end token", where=where, todo=todo)
        single = {name: control.get(pair[0], -1) for name, pair in (("system", form.system), ("user", form.user))}
        return Specials(
            bos=find(form.bos, "bos_token") if form.bos else -1,
            eos=eos,
            pad=find(form.pad, "pad_token", default=eos),
            assistant=control.get(form.assistant[0], -1),
            think_open=control.get(form.think_tokens[0], -1),
            think_close=control.get(form.think_tokens[1], -1),
            **single,
        )


def _is_control(token: dict[str, Any]) -> bool:
    """Whether an added token steers the model: marked special, or written in brackets or bars."""
    content = str(token["content"])
    return bool(token.get("special")) or (len(content) > 1 and any(mark in content for mark in "<[|｜"))


def _sound(text: str) -> str:
    """``text`` with lone surrogates, which are no UTF-8, replaced by "?"."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _byte_alphabet() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for (GPT-2's table).

    Printable Latin-1 stands for itself; the other bytes take the code points from 256 on, in order.
    """
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}
