# size: one noun, and what it holds is used together
"""One face for every tokenizer: ours, DeepSeek's, or any Hugging Face tokenizer.json.

The rule that matters for safety: **text is never a command.** If a user writes ``<|assistant|>`` or
``</think>`` into a question, a plain Hugging Face ``encode`` would give the ids of the real role and
think tokens, and the question could play the assistant. So two tokenizers are built from the same
file: one that knows the added tokens (for our own chat format and for decoding) and one from which the
control tokens have been taken out, which spells such a string in ordinary pieces. A conversation is encoded
as a whole all the same (``encode_parts``), because SentencePiece puts a space before whatever it is given alone.

Two sets of tokens are easily taken for one. **Control** tokens are never made from a user's text: special ones, and
all that look like markup. **Hidden** ones are never shown in an answer: special ones but the tags of calls, and those
that end it.
``<tool_call>`` is of the first set and not of the second: nobody can slip one in, and what the model says is seen.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sprat.errors import DataError
from sprat.files import atomic
from sprat.tokens import chat_formats, chat_template, hf_files
from sprat.tokens.chat_formats import ChatFormat, Part, SpecialTokenIds
from sprat.tokens.chat_tools import ChatTemplate
from sprat.tokens.hf_files import GenerationConfig
from sprat.tokens.tool_formats import TOOL_TAGS

if TYPE_CHECKING:
    import tokenizers

log = logging.getLogger(__name__)
BATCH_SIZE = 1024  # texts that one call hands to the Rust side; bounds memory
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """Text ↔ ids over one tokenizer.json (HF ``tokenizers``). Immutable; safe to share between threads.

    Attributes:
        chat_format: the chat format: as the folder's template writes it, else detected by its special tokens.
        ids: ids of the special tokens (-1 where there is none).
        eos_token_ids: ids that end an answer: the end token, what closes the assistant's turn, what the folder lists.
        generation_config: what the folder says of sampling.
        vocab_size: number of ids, added tokens included.
        digest: SHA-256 (hex) of tokenizer.json.
    """

    def __init__(
        self,
        text: str,
        *,
        config: dict[str, Any] | None = None,
        generation_config: GenerationConfig | None = None,
        where: str = "tokenizer.json",
    ) -> None:
        """Build from the text of a tokenizer.json, its tokenizer_config.json and its generation_config.json, if any.

        Raises:
            DataError: the text is no tokenizer.json, or the tokenizer has no end token.
        """
        import tokenizers

        self._json, self._config = text, dict(config or {})
        try:
            table = json.loads(text)
            table["added_tokens"] = table["added_tokens"] or []
            declared = _declared_added_tokens(table, self._config)
            added: list[dict[str, Any]] = table["added_tokens"] + declared
            table["added_tokens"] = added
            full_json = json.dumps(table) if declared else text
            self._full: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(full_json)
            self._full.no_padding()
            self._full.no_truncation()
            self._control = {token["content"]: int(token["id"]) for token in added if _is_control(token)}
            unseen = [token for token in added if token.get("special") and token["content"] not in TOOL_TAGS]
            self._special = {int(token["id"]) for token in unseen}
            self._strip_flags = {int(token["id"]): (bool(token["lstrip"]), bool(token["rstrip"])) for token in added}
            table["added_tokens"] = [token for token in added if token["content"] not in self._control]
            table.update(padding=None, truncation=None, post_processor=None)
            plain_json = json.dumps(table)
            self._plain: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(plain_json)
            # the same for text that does not stand at the beginning
            mid_json = plain_json.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
            same = mid_json == plain_json
            self._plain_mid_text = self._plain if same else tokenizers.Tokenizer.from_str(mid_json)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"not a tokenizer: {error}", where=where, todo="give an HF tokenizer.json") from None
        except Exception as error:  # the Rust side raises bare Exception
            todo = "give the tokenizer.json of an HF fast tokenizer"
            raise DataError(f"the tokenizer cannot be read: {error}", where=where, todo=todo) from None
        decoder = json.dumps(table.get("decoder"))
        self._byte_level, self._byte_fallback = '"ByteLevel"' in decoder, '"ByteFallback"' in decoder
        self._encode_cache: dict[str, tuple[int, ...]] = {}
        self._vocab: dict[str, int] = self._full.get_vocab(with_added_tokens=True)
        self.vocab_size: int = 1 + max(self._vocab.values(), default=-1)
        self.digest: str = hashlib.sha256(text.encode("utf-8")).hexdigest()
        self.generation_config = generation_config or GenerationConfig()
        base = chat_formats.detect_format(self._control, self._config)
        self.special_ids: SpecialTokenIds = self._find_special_ids(base, where)
        self.chat_format: ChatFormat = self._build_chat_format(base)
        self._warn_missing_tokens(where)
        eos_token_ids = {self.special_ids.eos, *self._turn_end_ids(), *self._config_eos_ids(where)}
        self.eos_token_ids: frozenset[int] = frozenset(eos_token_ids)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, *, numbers: int = 200) -> Tokenizer:
        """Train our own byte-level BPE; deterministic. 0 … numbers-1 are single tokens. See ``training``.

        Raises:
            ConfigError: ``vocab_size`` is too small.
        """
        from sprat.tokens.training import train_tokenizer_json

        return cls(train_tokenizer_json(texts, vocab_size, numbers=numbers))

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a folder that holds tokenizer.json, or that file itself.

        Raises:
            DataError: nothing there, or nothing that is a fast tokenizer.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            text = file.read_bytes().decode("utf-8")
        except FileNotFoundError:
            raise DataError("no tokenizer", where=str(file), todo="give a folder with a tokenizer.json") from None
        except ValueError as error:
            raise DataError(f"not UTF-8: {error}", where=str(file), todo="copy the file again") from None
        folder = file.parent
        config = hf_files.load_tokenizer_config(folder)
        return cls(text, config=config, generation_config=hf_files.load_generation_config(folder), where=str(file))

    def files(self) -> dict[str, str]:
        """What ``save`` writes, by the names of its files."""
        config, names = self._config, {}
        if self.chat_format == chat_formats.SPRAT:
            own = self.chat_format
            names = {"bos_token": own.bos, "eos_token": own.eos, "pad_token": own.pad}
            config = {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "clean_up_tokenization_spaces": False,
                "model_max_length": 1_000_000,
                **names,
                "chat_template": chat_formats.SPRAT_TEMPLATE,
            }
        files = {"tokenizer.json": self._json}
        if config:
            files["tokenizer_config.json"] = json.dumps(config, ensure_ascii=False, indent=2)
        if names:
            files["special_tokens_map.json"] = json.dumps(names, indent=2)
        if self.generation_config.raw:
            text = json.dumps(self.generation_config.raw, ensure_ascii=False, indent=2, sort_keys=True)
            files[hf_files.GENERATION_CONFIG_FILE] = text + "\n"
        return files

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json (with the chat template) and special_tokens_map.json.

        tokenizer.json keeps its digest. Each file is replaced at once, never half-written. What another tokenizer left
        there, and would be read with these files, is taken away.
        """
        folder, files = Path(folder), self.files()
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            atomic.write_text(folder / name, text)
        for name in hf_files.SIDE_FILES:
            if name not in files:
                (folder / name).unlink(missing_ok=True)

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Ids of ``text``. Without ``parse_special`` no control token can come out, whatever the text says."""
        encoder = self._full if parse_special else self._plain
        ids: list[int] = encoder.encode(_replace_surrogates(text), add_special_tokens=False).ids
        return ids if parse_special else self._without_control_ids(text, ids)

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a text to go on with, as transformers' tokenizers give them: what it spells is a control token, and
        what the tokenizer begins texts with comes first (with ours: the token that began each text in training)."""
        ids: list[int] = self._full.encode(_replace_surrogates(text), add_special_tokens=True).ids
        bos = self.special_ids.bos
        starts = self.chat_format.name == chat_formats.SPRAT.name and bos >= 0 and ids[:1] != [bos]
        return [bos, *ids] if starts else ids

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Ids of each text, as ``encode`` gives them, on all cores."""
        rows: list[list[int]] = []
        pending = [_replace_surrogates(text) for text in texts]
        for start in range(0, len(pending), BATCH_SIZE):
            part = pending[start : start + BATCH_SIZE]
            encodings = self._plain.encode_batch_fast(part, add_special_tokens=False)
            pairs = zip(part, encodings, strict=True)
            rows.extend(self._without_control_ids(text, encoding.ids) for text, encoding in pairs)
        return rows

    def encode_parts(self, parts: Iterable[Part]) -> list[int]:
        """Ids of a text of parts, encoded as a whole; control tokens come only out of those that are marked as ours.

        Where no other part spells a control token, these are the ids of ``encode(text, parse_special=True)``: what
        transformers makes of a rendered conversation. Where one does, the text between our control tokens is encoded
        run by run, as the tokenizer does it by itself, and what only looks like a control token is spelled out.
        """
        text, expected = "", []
        for part, is_template in _merge_parts(parts):
            spans = self._find_control_tokens(part, is_template)
            expected += [(token_id, len(text) + start, len(text) + end) for token_id, start, end in spans]
            text += part
        encoding = self._full.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        control = self.control_ids
        tokens = zip(ids, encoding.offsets, strict=True)
        actual = [(token_id, *span) for token_id, span in tokens if token_id in control]
        pairs = zip(actual, expected, strict=True)
        if len(actual) == len(expected) and all(a[0] == b[0] and a[1] <= b[1] and b[2] <= a[2] for a, b in pairs):
            return ids
        ids, position, strip_next = [], 0, False
        for token_id, start, end in [*expected, (-1, len(text), len(text))]:
            strip_left, strip_right = self._strip_flags.get(token_id, (False, False))
            run = text[position:start].lstrip() if strip_next else text[position:start]
            run = run.rstrip() if strip_left else run
            if run:
                encoder = self._plain_mid_text if position else self._plain
                ids += self._without_control_ids(run, encoder.encode(run, add_special_tokens=False).ids)
            ids += [token_id] if token_id >= 0 else []
            position, strip_next = end, strip_right
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Text of ``ids``; bytes that are no UTF-8 come out as U+FFFD. ``skip_special_tokens`` omits hidden tokens.

        Of a run of byte tokens what is UTF-8 is read, as SentencePiece does; the library alone gives up the whole run
        for one stray byte, so that a character could vanish again that was read already.
        """
        token_ids = [int(token_id) for token_id in ids]
        if skip_special_tokens:
            visible_ids = self._visible_ids
            token_ids = [token_id for token_id in token_ids if token_id in visible_ids]
        if self._byte_fallback and not self._byte_tokens.keys().isdisjoint(token_ids):
            text: str = self._full.decoder.decode(self._decode_byte_tokens(token_ids))
        else:
            text = self._full.decode(token_ids, skip_special_tokens=False)
        return text

    def is_visible(self, token_id: int) -> bool:
        """Whether token ``token_id`` adds anything to an answer: it is one, and not hidden."""
        return token_id in self._visible_ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that token ``token_id`` adds to the text; empty for hidden tokens and unknown ids."""
        return self._bytes_by_id[token_id] if 0 <= token_id < len(self._bytes_by_id) else b""

    def byte_length(self, ids: Sequence[int]) -> int:
        """How many bytes of text ``ids`` stand for; hidden tokens count nothing."""
        table = self._bytes_by_id
        return sum(len(table[token_id]) for token_id in ids)

    def encode_cached(self, text: str) -> tuple[int, ...]:
        """Ids of a string of the chat format (control tokens allowed), cached."""
        if text not in self._encode_cache:
            self._encode_cache[text] = tuple(self.encode(text, parse_special=True)) if text else ()
        return self._encode_cache[text]

    @property
    def control_tokens(self) -> Mapping[str, int]:
        """Tokens that user text can never produce, with their ids."""
        return self._control

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids that user text can never produce."""
        return frozenset(self._control.values())

    @cached_property
    def hidden_ids(self) -> frozenset[int]:
        """Ids that an answer never shows."""
        return self.eos_token_ids | self._special

    @cached_property
    def _visible_ids(self) -> frozenset[int]:
        """Ids of tokens that are not empty and not hidden; asked for every token, so kept."""
        return frozenset(token_id for token, token_id in self._full.get_vocab().items() if token) - self.hidden_ids

    @cached_property
    def _byte_tokens(self) -> dict[int, int]:
        """The byte of each byte token, by id."""
        matches = ((token_id, _BYTE_TOKEN.fullmatch(token)) for token, token_id in self._vocab.items())
        return {token_id: int(match[1], 16) for token_id, match in matches if match}

    def _decode_byte_tokens(self, token_ids: list[int]) -> list[str]:
        """The tokens of ``token_ids``, with U+FFFD for bytes that are no UTF-8."""
        tokens: list[str] = []
        run = bytearray()
        for token_id in [*token_ids, -1]:
            if token_id in self._byte_tokens:
                run.append(self._byte_tokens[token_id])
                continue
            while run:
                valid_end, invalid_end = len(run), len(run)
                try:
                    run.decode("utf-8")
                except UnicodeDecodeError as error:
                    valid_end, invalid_end = error.start, error.end
                tokens += [f"<0x{byte:02X}>" for byte in run[:valid_end]] + ["\ufffd"] * (invalid_end > valid_end)
                del run[:invalid_end]
            token = self._full.id_to_token(token_id) if token_id >= 0 else None
            if token is not None:
                tokens.append(token)
        return tokens

    def _find_control_tokens(self, text: str, is_template: bool) -> list[tuple[int, int, int]]:
        """Control tokens in a text of the chat format: id, start, end."""
        if not is_template or self._control_pattern is None:
            return []
        return [(self._control[match[0]], *match.span()) for match in self._control_pattern.finditer(text)]

    @cached_property
    def _control_pattern(self) -> re.Pattern[str] | None:
        """All control tokens, the longest first, as the tokenizer finds them."""
        names = sorted(self._control, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names))) if names else None

    @cached_property
    def _bytes_by_id(self) -> list[bytes]:
        """Bytes of every token, by id."""
        alphabet, hidden = _byte_alphabet(), self.hidden_ids
        table = [b""] * self.vocab_size
        added = {token.content for token in self._full.get_added_tokens_decoder().values()}
        for token, token_id in self._vocab.items():
            if token_id in hidden:
                continue
            if self._byte_level and token not in added and all(char in alphabet for char in token):
                table[token_id] = bytes(alphabet[char] for char in token)
            elif match := _BYTE_TOKEN.fullmatch(token):
                table[token_id] = bytes([int(match[1], 16)])
            else:  # "▁" is a space to SentencePiece, and a letter in DeepSeek's tags
                table[token_id] = (token if self._byte_level else token.replace("▁", " ")).encode("utf-8")
        return table

    def _without_control_ids(self, text: str, ids: list[int]) -> list[int]:
        """``ids``, or the ids of ``text`` with every control string cut in two where one came out as a token."""
        if self.control_ids.isdisjoint(ids):
            return ids
        names = [(re.escape(name[0]), re.escape(name[1:])) for name in self._control if len(name) > 1]
        pattern = "|".join(f"(?<={first})(?={rest})" for first, rest in names)
        parts = [self._plain.encode(part, add_special_tokens=False).ids for part in re.split(pattern, text) if part]
        return [token_id for part in parts for token_id in part if token_id not in self.control_ids]

    def _build_chat_format(self, base: ChatFormat) -> ChatFormat:
        """The chat format: the template's, or ``base`` where there is none."""
        template = self.find_template("default")
        if template is None or (base is chat_formats.SPRAT and template.text == chat_formats.SPRAT_TEMPLATE):
            return base
        return chat_template.format_from_template(base, template.text, dict(template.tokens))

    def find_template(self, name: str) -> ChatTemplate | None:
        """The folder's chat template: that of ``name`` where it has several by name, else the default one, or none."""
        template = self._config.get("chat_template")
        if isinstance(template, list):
            named = {row.get("name"): row.get("template") for row in template if isinstance(row, dict)}
            template = named.get(name) or named.get("default")
        if not isinstance(template, str) or not template:
            return None
        keys = chat_formats.SPECIAL_TOKEN_KEYS
        tokens = {key: token for key in keys if (token := chat_formats.special_token(self._config, key))}
        return ChatTemplate(template, tuple(sorted(tokens.items())))

    def find_control_token(self, text: str) -> str:
        """The first control token that ``text`` spells, or nothing."""
        match = self._control_pattern.search(text) if self._control_pattern is not None else None
        return match[0] if match else ""

    def _warn_missing_tokens(self, where: str) -> None:
        """Warn of added tokens that the folder lists and tokenizer.json does not have."""
        added_tokens_decoder = self._config.get("added_tokens_decoder")
        rows = added_tokens_decoder.values() if isinstance(added_tokens_decoder, dict) else ()
        names = {str(row.get("content")) for row in rows if isinstance(row, dict)}
        if missing := sorted(names - self._vocab.keys()):
            log.warning("%s: tokens that are listed beside it and not in it: %s", where, ", ".join(missing[:5]))

    def _turn_end_ids(self) -> list[int]:
        """The control token that closes the assistant's turn."""
        return [token_id for token_id, _, _ in self._find_control_tokens(self.chat_format.assistant[1], True)[:1]]

    def _config_eos_ids(self, where: str) -> list[int]:
        """The end tokens that the folder lists.

        Raises:
            DataError: one is no token.
        """
        for token_id in self.generation_config.eos_token_ids:
            if not 0 <= token_id < self.vocab_size:
                todo = "correct eos_token_id of generation_config.json"
                raise DataError(f"end token {token_id} is none of {self.vocab_size}", where=where, todo=todo)
        return list(self.generation_config.eos_token_ids)

    def _find_special_ids(self, chat_format: ChatFormat, where: str) -> SpecialTokenIds:
        """Find the special ids by the names of the format, else by tokenizer_config.json."""
        control = self._control

        def find(name: str, key: str, default: int = -1) -> int:
            return control.get(name, control.get(chat_formats.special_token(self._config, key), default))

        eos = find(chat_format.eos, "eos_token")
        if eos < 0:
            todo = "name eos_token in tokenizer_config.json"
            raise DataError("the tokenizer has no end token", where=where, todo=todo)
        role_openings = {
            "system": chat_format.system[0] if chat_format.system else "",
            "user": chat_format.user[0],
            "assistant": chat_format.generation_prompt,
        }
        role_ids = {role: control.get(text.removeprefix(chat_format.bos), -1) for role, text in role_openings.items()}
        return SpecialTokenIds(
            bos=find(chat_format.bos, "bos_token") if chat_format.bos else -1,
            eos=eos,
            pad=find(chat_format.pad, "pad_token", default=eos),
            think_open=control.get(chat_format.think_tags[0], -1),
            think_close=control.get(chat_format.think_tags[1], -1),
            **role_ids,
        )


def _merge_parts(parts: Iterable[Part]) -> Iterable[Part]:
    """``parts`` without lone surrogates, neighbours of one kind as one."""
    for is_template, same in itertools.groupby(parts, key=lambda part: part[1]):
        yield "".join(_replace_surrogates(text) for text, _ in same), is_template


def _declared_added_tokens(table: dict[str, Any], config: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of added_tokens for what tokenizer_config.json calls special and only the vocabulary has."""
    vocabulary = table["model"].get("vocab")
    if not isinstance(vocabulary, dict):
        return []
    added_tokens_decoder = config.get("added_tokens_decoder")
    names = {chat_formats.special_token(config, key) for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    rows = added_tokens_decoder.values() if isinstance(added_tokens_decoder, dict) else ()
    names |= {str(row.get("content")) for row in rows if isinstance(row, dict) and row.get("special")}
    names -= {token["content"] for token in table["added_tokens"]}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    found_tokens = sorted((vocabulary[name], name) for name in names if type(vocabulary.get(name)) is int)
    return [{"id": token_id, "content": name, "special": True, **flags} for token_id, name in found_tokens]


def _is_control(token: dict[str, Any]) -> bool:
    """Whether an added token steers the model: marked special, or written in brackets or bars."""
    content = str(token["content"])
    return bool(token.get("special")) or (len(content) > 1 and any(mark in content for mark in "<[|｜"))


def _replace_surrogates(text: str) -> str:
    """``text`` with lone surrogates, which are no UTF-8, replaced by "?"."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _byte_alphabet() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for (GPT-2's table).

    Printable Latin-1 stands for itself; the other bytes take the code points from 256 on, in order.
    """
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    return {chr(byte): byte for byte in shown} | {chr(256 + position): byte for position, byte in enumerate(hidden)}


def first_difference(first: Tokenizer, second: Tokenizer) -> int | None:
    """The least id that is not the same bytes, and a control token or not, in both; None where there is none."""
    if first.digest == second.digest:
        return None
    for token_id in range(min(first.vocab_size, second.vocab_size)):
        same = first.token_bytes(token_id) == second.token_bytes(token_id)
        if not same or (token_id in first.control_ids) != (token_id in second.control_ids):
            return token_id
    return None if first.vocab_size == second.vocab_size else min(first.vocab_size, second.vocab_size)
