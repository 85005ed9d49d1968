"""Schemathesis makes up a thousand requests from /openapi.json; none brings the server down, or to a bad error.

python -m bench.oracles schemathesis
"""

from __future__ import annotations

import json
import os
import subprocess
import urllib.request
from pathlib import Path

import pytest

from bench.serving.server import KEY, running
from tests.clients.server import WORKERS, environment
from tests.clients.workers.conversations import MODEL

CASES, EACH, SECONDS = 1000, 60, 500
BODIES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/embeddings")


@pytest.mark.slow
def test_a_thousand_made_up_requests(model: Path, tmp_path: Path) -> None:
    program = environment("schemathesis").with_name("schemathesis")
    calls = tmp_path / "calls"
    with running(model) as server:
        request = urllib.request.Request(server.url + "/openapi.json", headers={"Authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(request) as answer:
            paths = json.load(answer)["paths"]
        assert all(paths[path]["post"].get("requestBody") for path in BODIES), "their bodies are not described"
        done = subprocess.run(
            [str(program), "run", f"{server.url}/openapi.json", "-H", f"Authorization: Bearer {KEY}", "--no-color",
             "--checks", "not_a_server_error,errors_are_json", "--phases", "examples,coverage,fuzzing", "--seed", "7",
             "-n", str(EACH), "--no-shrink", "--continue-on-failure", "--request-timeout", "30",
             "--suppress-health-check", "all", "--generation-database", "none"],
            env={**os.environ, "SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(WORKERS),
                 "CALLS": str(calls), "MODEL": MODEL},
            cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS + 120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
        assert server.process.poll() is None and not server.trace, server.trace
    lines = calls.read_text(encoding="utf-8").splitlines()
    assert len(lines) >= CASES, len(lines)
    assert any(line.startswith("200 POST") for line in lines), "no body was right"
