"""Settings: what cannot be meant is refused when it is written down, in one clear sentence."""

from __future__ import annotations

import json

import pytest

from sprat.engine.sampling_params import Response, Sampling
from sprat.errors import EngineError


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("temperature", 10**400),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -1.0),
        ("top_k", -1),
        ("top_k", 1.5),
        ("max_tokens", 0),
        ("n", 0),
        ("seed", "x"),
        ("stop", ("",)),
        ("stop", 5),
        ("stop", ("x",) * 1000),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", ("a",)),
        ("thinking", "maybe"),
        ("min_think_tokens", True),
        ("max_think_tokens", 0),
        ("top_logprobs", 21),
        ("frequency_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("presence_penalty", None),
        ("repetition_penalty", 0.0),
        ("logit_bias", {"a": 1}),
        ("logit_bias", {3: 101}),
        ("logit_bias", {3: float("nan")}),
        ("logit_bias", {-1: 1}),
        ("logit_bias", 5),
        ("logit_bias", {index: 1 for index in range(5000)}),
        ("bad_words", "word"),
        ("bad_words", ("",)),
        ("bad_words", ((),)),
        ("bad_words", ((1, -1),)),
        ("bad_words", (5,)),
        ("response", {"type": "json_object"}),
        ("processors", (5,)),
    ],
)
def test_a_bad_setting_is_one_clear_sentence(name: str, value: object) -> None:
    with pytest.raises(EngineError) as caught:
        Sampling(**{name: value})  # type: ignore[arg-type]
    assert caught.value.where == name and caught.value.todo
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("name", "settings"),
    [("top_logprobs", {"top_logprobs": 3}), ("max_think_tokens", {"max_think_tokens": 3, "min_think_tokens": 4})],
)
def test_settings_that_contradict_each_other_are_named(name: str, settings: dict[str, int]) -> None:
    with pytest.raises(EngineError) as caught:
        Sampling(**settings)  # type: ignore[arg-type]
    assert caught.value.where == name


def test_settings_cannot_change_after_they_were_checked() -> None:
    stop, biases, words = ["a"], {7: 1.0, 3: -100}, [[1, 2], "x"]
    sampling = Sampling(stop=stop, logit_bias=biases, bad_words=words)  # type: ignore[arg-type]
    stop.append("b")
    biases[1] = 1000.0
    words[0].append(9)  # type: ignore[union-attr]
    assert sampling.stop == ("a",) and sampling.bad_words == ((1, 2), "x")
    assert sampling.logit_bias == ((3, -100), (7, 1.0)) and hash(sampling)
    assert Sampling(stop="END").stop == ("END",) and Sampling(stop=None).stop == ()  # type: ignore[arg-type]


def test_a_response_says_what_it_is() -> None:
    assert json.loads(Response.json().source) == {"type": "object"}
    assert Response.json('{"type":"array"}').source == '{"type":"array"}'
    assert Response.choice(["ja", "nein"]) == Response("choice", '["ja", "nein"]')
    for bad in (lambda: Response.choice([]), lambda: Response.choice("ja"), lambda: Response.regex("")):
        with pytest.raises(EngineError, match="response"):
            bad()
    with pytest.raises(EngineError, match="no JSON"):
        Response.json({"a": object()})
