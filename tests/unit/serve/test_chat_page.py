"""The page is one file that nothing foreign can enter."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from sprat.serve import ServeConfig, chat_page, create_app
from sprat.serve.app import ServedModel
from tests.unit.serve.scripted import ScriptedEngine


def test_the_page_comes_with_a_policy_that_admits_only_its_own_code() -> None:
    engine = ScriptedEngine()
    app = create_app([ServedModel(engine, engine.tokenizer, ("tiny",))], ServeConfig())
    client = TestClient(app, base_url="http://127.0.0.1")
    answer = client.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    again = client.get("/", headers={"if-none-match": answer.headers["etag"]})
    assert again.status_code == 304


def test_the_page_names_no_foreign_address_and_never_parses_text_as_html() -> None:
    text = chat_page.PAGE_FILE.read_text(encoding="utf-8")
    addresses = set(re.findall(r"https?://[^\s'\"<>)]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "style="):
        assert sink not in text, sink
    assert not re.search(r"\son[a-z]+=", text)


def test_a_page_with_a_second_script_is_refused(tmp_path: Path) -> None:
    wrong = tmp_path / "page.html"
    wrong.write_text("<style></style><script></script><script src='x'></script>")
    with pytest.raises(ValueError, match="exactly one plain <script>"):
        chat_page.load_chat_page(wrong)


def test_the_page_asks_the_server_where_the_page_itself_is() -> None:
    """Behind a proxy that shows the server at /llm, /v1/models is somebody else's."""
    text = chat_page.load_chat_page().body.decode()
    assert text.count("fetch(") == 1 and 'fetch(location.pathname.replace(/\\/+$/, "") + path' in text
