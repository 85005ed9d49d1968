"""Structured output: whatever the model would say, the answer has the form; whatever the form, the engine goes on."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator

from sprat.engine.sampling import grammar, grammar_compiler
from sprat.engine.sampling.grammar import GrammarCache
from sprat.engine.sampling.processors import build_processors
from sprat.engine.sampling.sampler import Sampler
from sprat.engine.sampling_params import Response, Sampling
from sprat.engine.sequence import DEFAULT_TENANT, Sequence, Tenant, noise_key
from sprat.errors import EngineError, MachineError, SpratError
from sprat.tokens import Tokenizer, split_reasoning
from tests.unit.engine.sampling.test_processors import plain_tags

ALICE, BOB = Tenant("alice", b"secret of alice"), Tenant("bob", b"secret of bob")
SCHEMAS: dict[str, dict[str, Any]] = {
    "record": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "tags": {"type": "array", "items": {"enum": ["a", "é", '😀 "x"']}, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
    "unicode": {
        "type": "object",
        "properties": {"größe": {"type": "number", "minimum": -1, "maximum": 1}, "名前": {"enum": ["太郎", "😀"]}},
        "required": ["größe", "名前"],
        "additionalProperties": False,
    },
    "tree": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "v": {"type": "boolean"},
                    "kids": {"type": "array", "maxItems": 1, "items": {"$ref": "#/$defs/node"}},
                },
                "required": ["v"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    "either": {
        "anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[a-f]{3}-[0-9]{2}$"}, {"const": {"x": [1, 2]}}]
    },
}


@pytest.fixture(scope="module", params=["tags are tokens", "tags are text"])
def either(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Tokenizer:
    """Both kinds of tokenizer."""
    return tokenizer if request.param == "tags are tokens" else plain_tags()


@pytest.fixture(scope="module")
def grammars(either: Tokenizer) -> Iterator[GrammarCache]:
    """Compiled grammars over one of them."""
    made = GrammarCache(either, frozenset({either.special_ids.eos}))
    yield made
    made.close()


def talk(
    tokenizer: Tokenizer, grammars: GrammarCache, sampling: Sampling, limit: int = 300, drafted: int = 0
) -> list[int]:
    """What a model says whose logits are noise; ``drafted`` tokens of nonsense are checked at each step."""
    sampler = Sampler(tokenizer, 1, frozenset({tokenizer.special_ids.eos}))
    sequence = Sequence(1, [1], sampling, limit, noise_key(sampling.seed, 0, [1]))
    sequence.processors = build_processors(sampling, [1], tokenizer, grammars)
    sampler.add(0, sequence)
    rows = drafted + 1
    while len(sequence.output_ids) < limit and sequence.output_ids[-1:] != [tokenizer.special_ids.eos]:
        generator = torch.Generator().manual_seed(sampling.seed * 1000 + len(sequence.output_ids))
        logits = torch.randn(1, tokenizer.vocab_size + 3, generator=generator).expand(rows, -1) * 2
        drafts = np.random.default_rng(len(sequence.output_ids)).integers(0, tokenizer.vocab_size, drafted).tolist()
        found = sampler.sample(logits, np.zeros(rows, np.int64), np.arange(rows), {0: drafts})
        assert not found.errors
        sequence.output_ids.append(int(found.tokens_R[0]))
        sampler.advance(np.array([0]))
    return sequence.output_ids


@pytest.mark.parametrize("name", SCHEMAS)
def test_noise_becomes_json_that_the_schema_accepts(either: Tokenizer, grammars: GrammarCache, name: str) -> None:
    ended = 0
    for seed in range(12):
        sampling = Sampling(temperature=2, seed=seed, thinking=False, response=Response.json(SCHEMAS[name]))
        ids = talk(either, grammars, sampling)
        if ids[-1] == either.special_ids.eos:
            ended += 1
            Draft202012Validator(SCHEMAS[name]).validate(
                json.loads(split_reasoning(either, ids, thinking=False).content)
            )
    assert ended >= 9


def test_any_json_object_a_regex_and_a_choice(either: Tokenizer, grammars: GrammarCache) -> None:
    options = ["ja", "nein", 'é "\n', "日本"]
    said = set()
    for seed in range(10):
        ids = talk(
            either, grammars, Sampling(temperature=2, seed=seed, thinking=False, response=Response.json()), limit=40
        )
        text = either.decode(ids, skip_special_tokens=True)
        assert text.startswith("{") and (ids[-1] != either.special_ids.eos or isinstance(json.loads(text), dict))
        ids = talk(
            either,
            grammars,
            Sampling(temperature=2, seed=seed, thinking=False, response=Response.regex("(é|[0-9]{2}){1,4}-?x")),
        )
        assert re.fullmatch("(é|[0-9]{2}){1,4}-?x", either.decode(ids, skip_special_tokens=True))
        ids = talk(
            either, grammars, Sampling(temperature=2, seed=seed, thinking=False, response=Response.choice(options))
        )
        said.add(either.decode(ids, skip_special_tokens=True))
    assert len(said) > 1 and said <= set(options)


@pytest.mark.parametrize("thinking", [True, None])
def test_the_form_begins_where_the_reasoning_ends(
    either: Tokenizer, grammars: GrammarCache, thinking: bool | None
) -> None:
    thought = 0
    for seed in range(20):
        sampling = Sampling(
            temperature=2,
            seed=seed,
            thinking=thinking,
            max_think_tokens=30,
            response=Response.choice(["ja", "nein"]),
            # The reasoning comes near its end now and then, in tokens that would go on behind it.
            logit_bias={index: 6.0 for text in ("</", "think", ">{", ">") for index in either.encode(text)[:1]},
        )
        ids = talk(either, grammars, sampling)
        answer = split_reasoning(either, ids, thinking=thinking)
        assert answer.content in ("ja", "nein") and answer.closed and ids[-1] == either.special_ids.eos
        thought += bool(answer.reasoning)
    assert thought > 10 if thinking else thought < 20


def test_a_token_that_ends_the_reasoning_and_goes_on_cannot_smuggle_text_past_the_form() -> None:
    foreign = plain_tags()
    grammars = GrammarCache(foreign, frozenset({foreign.special_ids.eos}))
    made = build_processors(Sampling(thinking=True, response=Response.choice(["ja"])), [1], foreign, grammars)
    said = foreign.encode("so </think")
    logits = np.zeros(foreign.vocab_size, np.float32)
    made[0].apply(logits, said, [])
    banned = {foreign.token_bytes(int(index)) for index in np.flatnonzero(np.isinf(logits))}
    assert banned == {b">x", b">{", b">\n", b""}
    grammars.close()


def test_drafts_are_masked_as_settled_tokens_are_and_leave_no_trace(either: Tokenizer, grammars: GrammarCache) -> None:
    for thinking in (False, True):
        sampling = Sampling(
            temperature=2, seed=4, thinking=thinking, max_think_tokens=12, response=Response.json(SCHEMAS["record"])
        )
        plain = talk(either, grammars, sampling)
        assert talk(either, grammars, sampling, drafted=3) == plain
        said, vocab = len(plain) // 2, either.vocab_size
        at_once = build_processors(sampling, [1], either, grammars)[-1]
        drafted = build_processors(sampling, [1], either, grammars)[-1]
        for draft_ids in range(6):
            one, other = np.zeros(vocab, np.float32), np.zeros(vocab, np.float32)
            at_once.apply(one, plain[: said + draft_ids], [])
            drafted.apply(other, plain[:said], plain[said : said + draft_ids])
            assert (one == other).all()


def _deep(levels: int) -> dict[str, Any]:
    """Arrays in arrays."""
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


HOSTILE = {
    "long": Response.regex("a" * 100_000),
    "deep": Response.json(_deep(500)),
    "wide": Response.json({"enum": list(range(20_000))}),
    "brackets": Response.regex("(" * 2000 + "a" + ")" * 2000),
    "look-around": Response.regex("(?=a)b"),
    "back-reference": Response.regex(r"(a)\1"),
    "unclosed": Response.regex("(a"),
    "surrogate": Response.regex("\udcff"),
    "explosion": Response.json(
        {"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for j in range(8)]} for i in range(12)]}
    ),
    "endless": Response.json({"allOf": [{"type": "integer", "multipleOf": p} for p in (9973, 9967, 9949, 9941)]}),
    "slow": Response.json({"allOf": [{"type": "integer", "multipleOf": p} for p in (1999, 2003)]}),
    "impossible": Response.json({"enum": []}),
    "itself": Response.json({"$ref": "#"}),
    "foreign": Response.json({"$ref": "http://example.com/schema.json"}),
    "no schema": Response("schema", '{"grammars": ['),
    "smuggled": Response("schema", '{}}, {"lark_grammar": "start: /x/"'),
    "wrong type": Response.json({"type": "integr"}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_is_one_clear_error_in_bounded_time(tokenizer: Tokenizer, name: str) -> None:
    grammars = GrammarCache(tokenizer, frozenset({tokenizer.special_ids.eos}), deadline=1.0)
    start = time.monotonic()
    with pytest.raises(EngineError) as caught:
        grammars.grammar(HOSTILE[name], False)
    assert time.monotonic() - start < 20  # the other process starts first
    assert caught.value.where == "response" and caught.value.todo
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    if name == "slow":  # some ten seconds where nobody ends it
        assert "took over 1 s" in str(caught.value)
    start = time.monotonic()
    with pytest.raises(EngineError):  # what was refused once costs nothing twice
        grammars.grammar(HOSTILE[name], False)
    assert time.monotonic() - start < 0.1
    assert talk(tokenizer, grammars, Sampling(response=Response.choice(["ja"])))[-1] == tokenizer.special_ids.eos
    grammars.close()


@pytest.mark.parametrize(
    "pattern",
    [
        "(x+x+)+y",
        "(a|aa)+",
        "(.*a.*b.*c.*){20}",
        "(a|b)*a(a|b){200}",
        "([a-z]{1,1000}){1,1000}",
        r"(\p{L}|\w|.){0,5000}",
    ],
)
def test_a_regex_that_kills_backtracking_engines_costs_little_at_each_token(tokenizer: Tokenizer, pattern: str) -> None:
    grammars = GrammarCache(tokenizer, frozenset({tokenizer.special_ids.eos}))
    made = grammars.grammar(Response.regex(pattern), False)
    rng, said, slowest = np.random.default_rng(0), list[int](), 0.0
    for _ in range(120):
        logits = np.zeros(tokenizer.vocab_size, np.float32)
        start = time.monotonic()
        made.apply(logits, said, [])
        slowest = max(slowest, time.monotonic() - start)
        said.append(int(rng.choice(np.flatnonzero(logits == 0))))
        if said[-1] == tokenizer.special_ids.eos:
            break
    assert slowest < 0.5
    grammars.close()


def test_the_process_that_compiles_may_die_and_many_threads_may_ask(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammars = GrammarCache(tokenizer, frozenset({tokenizer.special_ids.eos}))
    grammars.grammar(Response.choice(["a"]), False)
    process = grammars._idle[DEFAULT_TENANT].process
    assert process is not None
    process.kill()
    process.wait()
    grammars.grammar(Response.choice(["b"]), False)
    monkeypatch.setattr(grammar_compiler, "START_SECONDS", 0.0)
    grammars.close()
    with pytest.raises(MachineError, match="cannot be started"):
        grammars.grammar(Response.choice(["d"]), False)
    monkeypatch.undo()
    grammars.grammar(Response.choice(["d"]), False)  # which is not blamed for that
    found: list[object] = []
    ask = [
        threading.Thread(target=lambda i=i: found.append(grammars.grammar(Response.choice([f"c{i % 3}"]), False)))
        for i in range(9)
    ]
    for thread in ask:
        thread.start()
    for thread in ask:
        thread.join()
    assert len({id(one) for one in found}) == 9
    process = grammars._idle[DEFAULT_TENANT].process
    grammars.close()
    assert process is not None and process.poll() is not None


def test_only_so_many_grammars_are_kept(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "CACHE_ENTRIES", 4)
    grammars = GrammarCache(tokenizer, frozenset({tokenizer.special_ids.eos}))
    for index in range(9):
        grammars.grammar(Response.choice([f"c{index}"]), False)
        grammars.grammar(Response.choice(["c0"]), False)
    assert len(grammars._cache) == 4 and (DEFAULT_TENANT, Response.choice(["c0"])) in grammars._cache
    grammars.close()


def test_nobody_waits_for_the_slow_grammars_of_another(tokenizer: Tokenizer) -> None:
    grammars = GrammarCache(tokenizer, frozenset({tokenizer.special_ids.eos}), deadline=8.0)
    known, new = Response.choice(["known"]), Response.choice(["new"])
    for tenant in (ALICE, BOB):
        grammars.grammar(known, False, tenant)
    slow = [Response.json({"allOf": [{"multipleOf": p, "type": "integer"} for p in (1999, n)]}) for n in (2003, 2011)]
    ended: list[Exception] = []

    def ask(response: Response) -> None:
        try:
            grammars.grammar(response, False, ALICE)
        except SpratError as error:  # given up, or closed while its process started
            ended.append(error)

    threads = [threading.Thread(target=ask, args=(one,)) for one in slow]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    grammars.grammar(known, False, BOB)
    grammars.grammar(known, False, ALICE)
    assert grammars.grammar(new, False, BOB) is not None
    assert not ended, "all of it came before the first slow one was given up"
    while any(thread.is_alive() for thread in threads):  # those of one tenant come one after the other
        grammars.close()
        time.sleep(0.05)
    assert len(ended) == len(slow)


def test_tenants_share_neither_process_nor_what_it_compiled(tokenizer: Tokenizer) -> None:
    grammars = GrammarCache(tokenizer, frozenset({tokenizer.special_ids.eos}))
    for tenant in (ALICE, BOB):
        grammars.grammar(Response.choice(["secret"]), False, tenant)
    pids = {compiler.process.pid for compiler in grammars._idle.values() if compiler.process}
    assert len(pids) == 2 and len(grammars._cache) == 2
    for number in range(grammar.MAX_IDLE + 1):
        grammars.grammar(Response.choice(["x"]), False, Tenant(f"t{number}"))
    assert len(grammars._idle) == grammar.MAX_IDLE
    grammars.close()


def test_a_tenant_with_many_grammars_costs_nobody_else_theirs(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar, "CACHE_ENTRIES", 4)
    grammars = GrammarCache(tokenizer, frozenset({tokenizer.special_ids.eos}))
    grammars.grammar(Response.choice(["mine"]), False, BOB)
    for number in range(9):
        grammars.grammar(Response.choice([f"c{number}"]), False, ALICE)
    assert (BOB, Response.choice(["mine"])) in grammars._cache and len(grammars._cache) == 4
    grammars.close()
