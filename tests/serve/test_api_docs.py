"""docs/api.md is true: its curl lines are answered by a real ``sprat serve``, and what it lists is there."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import httpx
import pytest

from bench.serving.server import Server

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"<!-- run -->\n```bash\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_a_block_of_the_page_is_answered(served: Server, block: str) -> None:
    script = block.replace("http://127.0.0.1:8000", served.url).replace("curl ", "curl --fail-with-body ")
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip() and not re.search(r'"error": ?{', done.stdout)


@pytest.mark.slow
def test_the_blocks_for_a_call_and_a_form_give_what_they_ask_for(served: Server) -> None:
    answers = []
    for block in BLOCKS:
        if "tool_choice" in block or "json_schema" in block:
            script = block.replace("http://127.0.0.1:8000", served.url)
            text = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60).stdout
            answers.append(json.loads(text))
    call, form, custom = answers
    call, form = call["choices"][0], form["choices"][0]
    assert custom["output"][-1]["type"] == "custom_tool_call" and custom["output"][-1]["input"] in ("red", "blue")
    function = call["message"]["tool_calls"][0]["function"]
    assert function["name"] == "weather" and json.loads(function["arguments"])["city"] in ("Paris", "Rome")
    assert call["finish_reason"] == "tool_calls"
    assert set(json.loads(form["message"]["content"])) == {"sails"}


@pytest.mark.slow
def test_every_route_of_the_schema_is_on_the_page(served: Server) -> None:
    paths = httpx.get(f"{served.url}/openapi.json", timeout=30).json()["paths"]
    for path in paths:
        short = path.replace("{name}", "{id}").replace("/v1", "", 1)
        assert short in PAGE, f"docs/api.md says nothing of {path}"
