"""What a server says is learned only where it is an answer of the model that was asked; its key stays with us."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from sprat.config.teach import TracesConfig
from sprat.errors import ConfigError, ServeError
from sprat.post import teachers
from sprat.post.teachers import HTTPTeacher, Limits, Unanswered, read_answer
from sprat.tokens.chat import Message
from tests.unit.post.fake_teacher import completion, fake_teacher, reply

CONFIG = TracesConfig(teacher_model="wise", licence="MIT", max_tokens=50, seed=7)
QUICK = Limits(seconds=5, tries=3, backoff=0.01)
PROMPT = (Message("system", "Be brief."), Message("user", "2 + 2?"))


def choice(text: str | None, reason: str | None = "stop", **message: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"content": text, **message}, "finish_reason": reason}]}


def test_an_answer_comes_with_its_reasoning_and_what_it_cost() -> None:
    body = completion("4", **choice("4", reasoning_content="2 and 2"))
    asked: list[dict[str, Any]] = []

    def answer(request: dict[str, Any], before: int) -> Any:
        asked.append(request)
        return reply(body)

    with fake_teacher(answer) as fake:
        said = HTTPTeacher(fake.url + "/", CONFIG, key="secret-1", limits=QUICK).ask(PROMPT, sample=2)
    assert (said.text, said.reasoning, said.fault) == ("4", "2 and 2", "")
    assert (said.response_id, said.model, said.finish_reason) == (body["id"], "wise", "stop")
    assert said.usage == {"prompt_tokens": 10, "completion_tokens": 5}
    assert fake.headers[0]["path"] == "/v1/chat/completions" and fake.headers[0]["Authorization"] == "Bearer secret-1"
    assert asked[0]["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    assert (asked[0]["seed"], asked[0]["max_tokens"], asked[0]["stream"]) == (9, 50, False)


@pytest.mark.parametrize(
    ("changes", "text", "reasoning"),
    [
        (choice("4", reasoning="2 and 2"), "4", "2 and 2"),
        (choice("<think>\n2 and 2\n</think>\n\n4"), "4", "2 and 2"),
        ({**choice("4"), "model": "wise-2026-01-31"}, "4", ""),
    ],
)
def test_reasoning_is_kept_apart_wherever_a_server_puts_it(changes: dict[str, Any], text: str, reasoning: str) -> None:
    said = read_answer(json.dumps(completion("", **changes)).encode(), "application/json; charset=utf-8", "wise")
    assert (said.text, said.reasoning, said.fault) == (text, reasoning, "")


CALL = {"id": "a", "type": "function", "function": {"name": "search", "arguments": "{}"}}


def test_an_answer_in_parts_of_text_is_one() -> None:
    parts = [{"type": "text", "text": "it is "}, {"type": "text", "text": "4"}]
    answer = teachers.read_answer(json.dumps(completion("", **choice(parts))).encode(), "application/json", "wise")
    assert (answer.text, answer.fault) == ("it is 4", "")


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (completion("", **choice("The sum of", "length")), teachers.CUT_OFF),
        (completion("", **choice("4", "content_filter")), teachers.NO_END),
        (completion("", **choice("4", None)), teachers.NO_END),
        (completion("", **choice(None)), teachers.EMPTY),
        (completion("", **choice([{"type": "image_url", "image_url": {"url": "x"}}])), teachers.NO_TEXT),
        (completion("", **choice({"text": "4"})), teachers.NO_TEXT),
        (
            completion(
                "", choices=[{"message": {"content": "Let me see", "tool_calls": [CALL]}, "finish_reason": "stop"}]
            ),
            teachers.TOOL_CALL,
        ),
        (completion("", **choice(" \n")), teachers.EMPTY),
        (completion("", **choice("<think>2 and")), teachers.BAD_REASONING),
        (completion("", **choice("4 \ud800")), teachers.NOT_TEXT),
        (completion("4", model="cheap"), teachers.OTHER_MODEL),
        (completion("4", model="wise-7b"), teachers.OTHER_MODEL),
        (completion("4", model=None), teachers.OTHER_MODEL),
        (completion("4", usage=None), teachers.NO_USAGE),
        (completion("4", usage={"prompt_tokens": -1, "completion_tokens": True}), teachers.NO_USAGE),
        (completion("4", choices=[]), teachers.NO_CHOICES),
        (completion("4", choices={"message": "4"}), teachers.NO_CHOICES),
        (completion("4", choices=[{"message": "4"}]), teachers.NO_CHOICES),
        ({"error": {"message": "overloaded"}}, teachers.AN_ERROR),
        ([], teachers.NO_CHOICES),
        (b'{"id": "1", "choices": [{"mess', teachers.BROKEN_JSON),
        (b"", teachers.BROKEN_JSON),
        (b"[" * 100_000, teachers.BROKEN_JSON),
    ],
)
def test_what_is_no_answer_says_why(body: Any, fault: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    assert read_answer(content, "application/json", "wise").fault == fault


def test_a_page_of_a_proxy_and_a_stream_are_no_answers() -> None:
    for kind in ("text/html", "text/event-stream", ""):
        assert read_answer(json.dumps(completion("4")).encode(), kind, "wise").fault == teachers.NOT_JSON


def test_a_busy_server_is_asked_again_when_it_says() -> None:
    def answer(request: dict[str, Any], before: int) -> Any:
        return [reply({}, 429, Retry_After="1"), reply(b"no", 503), reply(completion("4"))][before]

    with fake_teacher(answer) as fake:
        began = time.monotonic()
        assert HTTPTeacher(fake.url, CONFIG, limits=QUICK).ask(PROMPT).text == "4"
        assert time.monotonic() - began >= 1 and len(fake.log) == 3
    with (
        fake_teacher(lambda request, before: reply({}, 429, Retry_After="86400")) as fake,
        pytest.raises(ServeError, match="asks to wait 86400 s"),
    ):
        HTTPTeacher(fake.url, CONFIG, limits=QUICK).ask(PROMPT)


@pytest.mark.parametrize(
    ("status", "tries", "kind"),
    [(500, 3, "HTTP 500"), (429, 3, "HTTP 429"), (400, 1, "HTTP 400"), (422, 1, "HTTP 422")],
)
def test_a_question_that_gets_no_answer_is_counted_by_kind(status: int, tries: int, kind: str) -> None:
    with fake_teacher(lambda request, before: reply(b"too long", status)) as fake, pytest.raises(Unanswered) as failed:
        HTTPTeacher(fake.url, CONFIG, limits=QUICK).ask(PROMPT)
    assert failed.value.kind == kind and len(fake.log) == tries


def test_what_every_question_would_meet_ends_it_at_once_and_the_key_is_not_repeated() -> None:
    with (
        fake_teacher(lambda request, before: reply({"error": "bad key secret-1"}, 401)) as fake,
        pytest.raises(ServeError, match=r"HTTP 401.*\*\*\*.*--key-env") as failed,
    ):
        HTTPTeacher(fake.url, CONFIG, key="secret-1", limits=QUICK).ask(PROMPT)
    assert "secret-1" not in str(failed.value) and len(fake.log) == 1


def test_no_redirect_is_followed() -> None:
    with fake_teacher(lambda request, before: reply(completion("4"))) as elsewhere:
        target = elsewhere.url.replace("127.0.0.1", "localhost") + "/chat/completions"
        with (
            fake_teacher(lambda request, before: reply(b"", 307, Location=target)) as fake,
            pytest.raises(ServeError, match="points to localhost"),
        ):
            HTTPTeacher(fake.url, CONFIG, key="secret-1", limits=QUICK).ask(PROMPT)
        assert not elsewhere.log


def test_silence_drips_floods_and_broken_bodies_end() -> None:
    quick = Limits(seconds=0.4, tries=2, backoff=0.01, max_bytes=1000)

    def asked(answer: Any) -> Any:
        with fake_teacher(answer) as fake:
            return HTTPTeacher(fake.url, CONFIG, limits=quick).ask(PROMPT)

    def silent(request: dict[str, Any], before: int) -> Any:
        time.sleep(0.8)
        return reply(completion("4"))

    def dripping(request: dict[str, Any], before: int) -> Any:
        return 200, {"Content-Type": "application/json"}, (time.sleep(0.1) or b" " for _ in range(20))

    for slow in (silent, dripping):
        began = time.monotonic()
        with pytest.raises(Unanswered, match="in time"):
            asked(slow)
        assert time.monotonic() - began < 3
    with pytest.raises(Unanswered, match="broken connection"):
        asked(lambda request, before: (200, {"Content-Type": "application/json", "Content-Length": "90"}, b'{"id":'))
    assert asked(lambda request, before: reply(completion("4" * 2000))).fault == teachers.TOO_LARGE
    with pytest.raises(Unanswered, match="broken connection"):
        HTTPTeacher("http://127.0.0.1:9/v1", CONFIG, limits=quick).ask(PROMPT)


@pytest.mark.parametrize(
    ("url", "key", "said"),
    [
        ("ftp://host/v1", "", "no URL"),
        ("https://", "", "no URL"),
        ("https://host:99999/v1", "", "no URL"),
        ("https://host/v1\r\nX: 1", "", "no URL"),
        ("https://user:pass@host/v1", "", "a login"),
        ("https://host/v1?key=1", "", "a query"),
        ("http://example.org/v1", "k", "unencrypted"),
        ("http://8.8.8.8/v1", "k", "unencrypted"),
        ("https://host/v1", "k\r\nX: 1", "characters"),
    ],
)
def test_an_address_or_a_key_that_cannot_be_is_one_sentence(url: str, key: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as failed:
        HTTPTeacher(url, CONFIG, key=key)
    assert "pass" not in str(failed.value)
    assert HTTPTeacher("http://192.168.1.5:8000/v1", CONFIG, key="k").url == "http://192.168.1.5:8000/v1"


def test_a_certificate_of_nobody_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    files = ["-keyout", str(tmp_path / "key.pem"), "-out", str(tmp_path / "cert.pem")]
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "1", *files]
    subprocess.run(words, check=True, capture_output=True)
    monkeypatch.setenv("no_proxy", "*")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with fake_teacher(lambda request, before: reply(completion("4")), context) as fake:
        with pytest.raises(ServeError, match="no trust in the certificate"):
            HTTPTeacher(fake.url, CONFIG, key="secret-1", limits=QUICK).ask(PROMPT)
        assert not fake.log
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
        assert HTTPTeacher(fake.url, CONFIG, key="secret-1", limits=QUICK).ask(PROMPT).text == "4"
