"""The access log: a line of JSON a request, with nothing in it that was said."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from dataclasses import fields
from datetime import UTC, datetime, timedelta, timezone

import pytest

from sprat.serve import access_log
from sprat.serve.access_log import AccessRecord, log_request, write_lines_to


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    log = access_log.log
    before = log.level, log.propagate
    handler = write_lines_to(stream)
    yield stream
    log.removeHandler(handler)
    log.setLevel(before[0])
    log.propagate = before[1]


def record(**changes: object) -> AccessRecord:
    settings: dict[str, object] = {
        "request_id": "chatcmpl-1",
        "tenant": "0123456789abcdef" * 4,
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "seconds": 1.23456789,
    }
    return AccessRecord(**{**settings, **changes})  # type: ignore[arg-type]


def test_a_line_has_all_and_reads_as_json(stream: io.StringIO) -> None:
    log_request(
        record(model="smol", prompt_tokens=5, completion_tokens=7, first_token_seconds=0.25, ended_by="disconnect")
    )
    line = json.loads(stream.getvalue())
    assert datetime.fromisoformat(line.pop("time")).utcoffset() == timedelta(0)
    assert line == {
        "request_id": "chatcmpl-1",
        "tenant": "0123456789ab",
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "seconds": 1.2346,
        "model": "smol",
        "stream": False,
        "prompt_tokens": 5,
        "cached_tokens": 0,
        "completion_tokens": 7,
        "reasoning_tokens": 0,
        "queue_seconds": None,
        "first_token_seconds": 0.25,
        "finish_reason": "",
        "ended_by": "disconnect",
        "code": "",
    }


def test_no_field_takes_what_was_said() -> None:
    """A new field is looked at by somebody."""
    assert {field.name for field in fields(AccessRecord)} == {
        *("request_id", "tenant", "method", "path", "status", "seconds", "model", "stream", "queue_seconds"),
        *("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens", "first_token_seconds"),
        *("finish_reason", "ended_by", "code"),
    }


def test_the_query_is_left_out(stream: io.StringIO) -> None:
    log_request(record(path="/v1/models?api_key=sk-secret"))
    assert json.loads(stream.getvalue())["path"] == "/v1/models" and "secret" not in stream.getvalue()


def test_nobody_can_begin_a_line_or_fill_the_disk(stream: io.StringIO) -> None:
    evil = 'x"}\n{"status": 200}\r\u2028\x1b[2J\ud800' + "y" * 10**6
    log_request(record(model=evil, request_id=evil, path="/" + evil))
    text = stream.getvalue()
    assert text.isascii() and text.splitlines() == [text[:-1]] and "\x1b" not in text and len(text) < 3000
    assert json.loads(text)["model"] == evil[:128]


def test_time_is_utc() -> None:
    at = datetime(2026, 1, 1, 1, 30, tzinfo=timezone(timedelta(hours=2)))
    assert json.loads(record().line(at))["time"] == "2025-12-31T23:30:00.000Z"
    assert json.loads(record().line(datetime(2026, 1, 1, tzinfo=UTC)))["time"] == "2026-01-01T00:00:00.000Z"


def test_it_goes_through_logging(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sprat.serve.access"):
        log_request(record(status=503, code="overloaded"))
    (entry,) = caplog.records
    assert entry.name == "sprat.serve.access" and json.loads(entry.message)["code"] == "overloaded"
    caplog.clear()
    with caplog.at_level(logging.WARNING, "sprat.serve.access"):
        log_request(record())
    assert not caplog.records
