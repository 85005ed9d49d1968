"""Clients of the OpenAI and DeepSeek form get what they expect, whole and streamed, with the cost."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from sprat.serve import ServeConfig, create_app
from sprat.serve.app import ServedModel
from tests.unit.serve.live import live
from tests.unit.serve.scripted import ScriptedEngine, within

ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "add 3 and 4 and 5"}]}
CHAT = "/v1/chat/completions"


TINY = ServeConfig(served_model_name="tiny", examples=("3+4=",))


def client_of(engine: Any, *, default_sampling: dict[str, Any] | None = None, **settings: Any) -> TestClient:
    """A client of a server in this process; ``engine`` is scripted."""
    models = [ServedModel(engine, engine.tokenizer, ("tiny",), default_sampling or {})]
    return TestClient(create_app(models, TINY.replace(**settings)), base_url="http://127.0.0.1:8000")


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def client(engine: ScriptedEngine) -> Iterator[TestClient]:
    with client_of(engine) as client:
        yield client


def chunks_of(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_the_model_list_names_the_model_its_examples_and_prices(client: TestClient) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    (card,) = listed["data"]
    assert (card["id"], card["object"], card["owned_by"]) == ("tiny", "model", "sprat")
    assert card["sprat"]["examples"] == ["3+4="]
    assert card["sprat"]["prices"]["output"] == 16000
    assert client.get("/v1/models/tiny").json() == card
    assert client.get("/v1/models/other").status_code == 404


def test_a_whole_answer_has_reasoning_content_usage_and_cost(client: TestClient) -> None:
    answer = client.post(CHAT, json={**ASK, "seed": 5}).json()
    (choice,) = answer["choices"]
    assert answer["object"] == "chat.completion"
    assert choice["finish_reason"] == "stop"
    assert choice["message"]["content"] == "The sum is 12"
    assert choice["message"]["reasoning_content"].endswith("7 + 5 = 12.")
    usage = answer["usage"]
    assert usage["prompt_cache_hit_tokens"] + usage["prompt_cache_miss_tokens"] == usage["prompt_tokens"] == 6
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 15
    assert usage["total_tokens"] == 6 + usage["completion_tokens"] == 6 + 19
    assert answer["sprat"]["cost"]["total"] == 2 * 1000 + 4 * 4000 + 19 * 16000
    assert answer["sprat"]["seed"] == 5


def test_a_stream_is_role_reasoning_content_finish_usage_done(client: TestClient) -> None:
    ask = {**ASK, "stream": True, "stream_options": {"include_usage": True}}
    answer = client.post(CHAT, json=ask)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, done = chunks_of(answer.text)
    assert done == "[DONE]"
    said = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert all("reasoning_content" in delta for delta in said[:-1]), "langchain reads it of each"
    deltas = [{name: value for name, value in delta.items() if value is not None} for delta in said]
    assert deltas[0] == {"role": "assistant", "content": ""}
    kinds = [next(iter(delta)) for delta in deltas[1:-1]]
    assert kinds == sorted(kinds, reverse=True)  # reasoning_content, then content
    assert "".join(delta.get("content", "") for delta in deltas) == "The sum is 12"
    assert "".join(delta.get("reasoning_content", "") for delta in deltas).startswith("0 + 3 = 3.")
    assert deltas[-1] == {}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(deltas) - 1) + ["stop"]
    assert all(chunk.get("usage") is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    whole = client.post(CHAT, json=ASK).json()
    assert chunks[-1]["usage"] == whole["usage"]
    assert chunks[-1]["sprat"]["cost"] == whole["sprat"]["cost"]
    assert len({chunk["id"] for chunk in chunks}) == 1


def test_a_stream_without_usage_still_ends_with_the_cost(client: TestClient) -> None:
    *chunks, done = chunks_of(client.post(CHAT, json={**ASK, "stream": True}).text)
    assert done == "[DONE]"
    assert ["usage" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True], "as DeepSeek sends it"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["sprat"]["cost"]["total"] > 0


def test_what_is_asked_for_reaches_the_engine(client: TestClient, engine: ScriptedEngine) -> None:
    more = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "max_tokens": 7, "stop": ["x", "y"], "seed": 2**40}
    answer = client.post(CHAT, json={**ASK, **more, "thinking": {"type": "disabled"}}).json()
    question, sampling = engine.asked[-1]
    assert question.strip() == "add 3 and 4 and 5"
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (0.5, 0.9, 3, 7)
    assert (sampling.stop, sampling.seed, sampling.thinking) == (("x", "y"), 2**40, False)
    assert not answer["choices"][0]["message"].get("reasoning_content")


def test_a_developer_is_a_system_to_the_engine(client: TestClient, engine: ScriptedEngine) -> None:
    for role in ("system", "developer"):
        said = {"role": role, "content": "Be short."}
        assert client.post(CHAT, json={**ASK, "messages": [said, *ASK["messages"]]}).status_code == 200
    first, second = (handle.job.prompt_ids for handle in engine.handles)
    assert list(first) == list(second) and "Be short." in engine.asked[0][0]


def test_an_answer_can_be_sent_back_as_the_openai_client_dumps_it(client: TestClient) -> None:
    said = client.post(CHAT, json=ASK).json()["choices"][0]["message"]
    dumped = {**dict.fromkeys(("refusal", "annotations", "audio", "function_call", "tool_calls")), **said}
    again = client.post(CHAT, json={**ASK, "messages": [*ASK["messages"], dumped, *ASK["messages"]]})
    assert again.status_code == 200, again.text


def test_null_leaves_the_folders_settings_in_force(engine: ScriptedEngine) -> None:
    with client_of(engine, default_sampling={"temperature": 0.25, "top_k": 9}) as client:
        nothing = dict.fromkeys(("temperature", "top_k", "top_p", "stream", "n", "logprobs", "max_tokens"))
        assert client.post(CHAT, json={**ASK, **nothing}).json()["object"] == "chat.completion"
    sampling = engine.asked[-1][1]
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.25, 9, 1.0)


@pytest.mark.parametrize("asked", [{}, {"max_tokens": None}, {"max_tokens": 4}, {"max_completion_tokens": 4}])
def test_a_cut_answer_says_length_and_who_names_no_limit_gets_the_servers(
    engine: ScriptedEngine, asked: dict[str, Any]
) -> None:
    with client_of(engine, max_tokens=4) as client:
        answer = client.post(CHAT, json={**ASK, **asked}).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("more", [5, 10_000, 10**30])
@pytest.mark.parametrize("streams", [False, True])
def test_more_tokens_than_the_server_gives_are_refused_by_name(
    engine: ScriptedEngine, name: str, more: int, streams: bool
) -> None:
    with client_of(engine, max_tokens=4) as client:
        answer = client.post(CHAT, json={**ASK, name: more, "stream": streams})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", name)
    assert name in error["message"] and ("at most 4 tokens" if more < 2**63 else "at most") in error["message"]
    assert not engine.asked


@pytest.mark.parametrize(
    ("request_", "status", "param"),
    [
        ({"json": {**ASK, "temperature": 9}}, 400, "temperature"),
        ({"json": {**ASK, "model": "gpt"}}, 404, "model"),
        ({"json": {**ASK, "messages": [{"role": "user", "content": "too long"}]}}, 400, "messages"),
        ({"json": {**ASK, "messages": [{"role": "robot", "content": "x"}]}}, 400, "messages[0].role"),
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, None),
        ({"content": b'{"model": "\xff"}', "headers": {"content-type": "application/json"}}, 400, None),
        ({"content": json.dumps(ASK).encode("utf-16"), "headers": {"content-type": "application/json"}}, 400, None),
        ({"content": json.dumps(ASK), "headers": {"content-type": "text/plain"}}, 415, "Content-Type"),
        ({"json": {**ASK, "user": "x" * 40_000_000}}, 413, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_refusal_is_an_openai_error_object(
    client: TestClient, request_: dict[str, Any], status: int, param: str | None, stream: bool
) -> None:
    if "json" in request_:
        request_ = {"json": {**request_["json"], "stream": stream}}
    answer = client.post(CHAT, **request_)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["message"] and error["type"] and error["code"]


def test_a_body_without_a_length_is_bounded_too(client: TestClient) -> None:
    endless = (b" " * 1_000_000 for _ in range(40))
    answer = client.post(CHAT, content=endless, headers={"content-type": "application/json"})
    assert answer.status_code == 413


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nothing", 404), ("GET", CHAT, 405), ("GET", "/docs", 404)]
)
def test_unknown_paths_are_error_objects_too(client: TestClient, method: str, path: str, status: int) -> None:
    answer = client.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]
    assert (status == 405) == (answer.headers.get("allow") == "POST")  # RFC 9110, 15.5.6


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:8000", "user@127.0.0.1", "", "localhost.evil"]
)
def test_a_rebound_name_sees_nothing(client: TestClient, host: str) -> None:
    assert client.get("/v1/models", headers={"host": host}).status_code == 403


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:1", "[::1]:8000", "LOCALHOST", "box.lan"])
def test_own_names_are_served(engine: ScriptedEngine, host: str) -> None:
    with client_of(engine, allowed_hosts=["Box.lan"]) as client:
        assert client.get("/v1/models", headers={"host": host}).status_code == 200


def test_other_sites_cannot_spend_here(client: TestClient, engine: ScriptedEngine) -> None:
    for origin in ("https://evil.example", "null", "http://127.0.0.1:9999"):
        assert client.post(CHAT, json=ASK, headers={"origin": origin}).status_code == 403
    assert not engine.asked
    answer = client.post(CHAT, json=ASK, headers={"origin": "http://127.0.0.1:8000"})
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


def test_a_crash_tells_no_secrets() -> None:
    def broken(question: str, sampling: Any) -> tuple[str, str]:
        raise KeyError("secret place")

    with client_of(ScriptedEngine(broken)) as client:
        answer = client.post(CHAT, json=ASK)
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.json()["error"]["type"] == "server_error"


def test_one_too_many_is_told_when_to_come_back() -> None:
    engine = ScriptedEngine(hold=True)
    settings = {"max_num_seqs": 1, "max_num_queued_reqs": 0}
    with live(engine, **settings) as address, httpx.Client(base_url=address, timeout=30) as client:
        with client.stream("POST", CHAT, json={**ASK, "stream": True}) as first:
            lines = first.iter_lines()
            next(lines)
            refused = client.post(CHAT, json=ASK)
            assert refused.status_code in (429, 503)
            assert int(refused.headers["retry-after"]) >= 1
            engine.release()
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert client.post(CHAT, json=ASK).status_code == 200


def sample(client: httpx.Client, name: str) -> float:
    """One number of /metrics."""
    (line,) = [line for line in client.get("/metrics").text.splitlines() if line.startswith(f"sprat:{name} ")]
    return float(line.split()[-1])


def running(client: httpx.Client) -> float:
    return sample(client, 'num_requests_running{model_name="tiny"}')


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_stops_the_engine(stream: bool) -> None:
    engine = ScriptedEngine(hold=True)
    with live(engine) as address:
        with httpx.Client(base_url=address, timeout=0.7) as client, pytest.raises(httpx.TimeoutException):
            client.post(CHAT, json={**ASK, "stream": stream})
        assert within(20, lambda: bool(engine.handles) and engine.handles[0].ended.is_set())
        assert engine.handles[0].cancelled.is_set()
        with httpx.Client(base_url=address, timeout=30) as client:
            assert within(20, lambda: running(client) == 0)
            assert sample(client, 'generation_tokens_total{model_name="tiny"}') == engine.handles[0].said


def test_a_stopped_stream_ends_in_good_order_with_its_cost() -> None:
    engine = ScriptedEngine(hold=True)
    with live(engine) as address, httpx.Client(base_url=address, timeout=30) as client:
        with client.stream("POST", CHAT, json={**ASK, "stream": True}) as answer:
            lines = (line for line in answer.iter_lines() if line)
            name = json.loads(next(lines).removeprefix("data: "))["id"]
            assert client.post(f"{CHAT}/{name}/cancel").status_code == 204
            *_, last, done = lines
        assert done == "data: [DONE]"
        chunk = json.loads(last.removeprefix("data: "))
        assert chunk["choices"][0]["finish_reason"] == "stop"
        assert chunk["sprat"]["cost"]["output"] == engine.handles[0].said * 16000 <= 2 * 16000
        assert within(20, lambda: client.post(f"{CHAT}/{name}/cancel").status_code == 404)


def test_many_at_once_each_get_their_own_answer() -> None:
    with live(ScriptedEngine(pause=0.001)) as address:
        answers: dict[int, str] = {}

        def ask(number: int) -> None:
            body = {**ASK, "messages": [{"role": "user", "content": f"add 100 and {number}"}]}
            answer = httpx.post(f"{address}{CHAT}", json=body, timeout=60).json()
            answers[number] = answer["choices"][0]["message"]["content"]

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == {number: f"The sum is {100 + number}" for number in range(16)}


def test_what_a_request_leaves_unsaid_the_models_folder_says(engine: ScriptedEngine) -> None:
    with client_of(engine, default_sampling={"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1}) as client:
        client.post(CHAT, json=ASK)
        client.post(CHAT, json={**ASK, "temperature": 1.0, "top_k": 0})
    (_, silent), (_, said) = engine.asked
    assert (silent.temperature, silent.top_k, silent.top_p, silent.repetition_penalty) == (0.6, 20, 1.0, 1.1)
    assert (said.temperature, said.top_k, said.repetition_penalty) == (1.0, 0, 1.1)


def test_to_think_is_a_wish_and_a_model_that_cannot_answers_without() -> None:
    """Claude Code asks every server for it."""
    from sprat.engine import Engine
    from tests.unit.engine.test_request import thoughtless

    app = create_app(Engine(*thoughtless()), TINY)
    with TestClient(app, base_url="http://127.0.0.1:8000") as client:
        for path, wish, listed in (
            (CHAT, {"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
            (CHAT, {"thinking": {"type": "auto"}, "reasoning_effort": "low"}, "thinking, reasoning_effort"),
            (CHAT, {"reasoning_effort": "none"}, None),
            (CHAT, {"thinking": {"type": "disabled"}}, None),
            (CHAT, {"chat_template_kwargs": {"enable_thinking": True}}, "chat_template_kwargs.enable_thinking"),
            (CHAT, {"chat_template_kwargs": {"enable_thinking": False}}, None),
            ("/v1/messages", {"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
            ("/v1/messages", {"thinking": {"type": "adaptive"}, "output_config": {"effort": "high"}},
             "thinking, output_config.effort"),
            ("/v1/messages", {"thinking": {"type": "disabled"}}, None),
        ):  # fmt: skip
            answer = client.post(path, json={**ASK, "max_tokens": 2, **wish})
            assert (answer.status_code, answer.headers.get("x-ignored-fields")) == (200, listed), (path, wish)
            streamed = client.post(path, json={**ASK, "max_tokens": 2, "stream": True, **wish})
            assert (streamed.status_code, streamed.headers.get("x-ignored-fields")) == (200, listed), (path, wish)
        responses = {"model": "tiny", "input": "Hi", "max_output_tokens": 2, "reasoning": {"effort": "high"}}
        assert client.post("/v1/responses", json=responses).headers["x-ignored-fields"] == "reasoning.effort"
        counted = client.post("/v1/messages/count_tokens", json={**ASK, "thinking": {"type": "adaptive"}})
        assert counted.headers["x-ignored-fields"] == "thinking"
        wrong = client.post(CHAT, json={**ASK, "thinking": {"type": "enabled", "budget_tokens": "many"}})
        assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "thinking.budget_tokens")
