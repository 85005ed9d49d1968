"""aiperf and guidellm, unchanged, against the server: all requests answered, and what they report of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from bench.oracles import make_clients
from bench.serving.rows import Plan, Row, Say
from bench.serving.server import Server, running

AT_ONCE, ASKED, QUESTION = 8, 32, 64  # streams, requests, tokens of a question
SECONDS = 600
NAMES = {"ttft": "time to first token", "itl": "between tokens", "e2e": "end to end"}


def _run(command: list[str], place: str) -> None:
    """Run a tool. HF_HUB_OFFLINE stays unset: under it aiperf takes a folder for the name of a repository.

    Raises:
        RuntimeError: it failed; with its last words.
    """
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")}
    done = subprocess.run(
        ["nice", "-n", "5", *command], cwd=place, env=environment, capture_output=True, text=True, timeout=SECONDS,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-1500:])


def tokenizer_folder(model: Path, place: str) -> Path:
    """The model's tokenizer as transformers reads it; guidellm makes up questions with it."""
    folder = Path(place) / "tokenizer"
    folder.mkdir()
    shutil.copy(model / "tokenizer.json", folder)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "model_max_length": 2048}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def aiperf(server: Server, model: Path, tokens: int, place: str) -> tuple[int, dict[str, tuple[float, float]]]:
    """Requests that were answered, and p50 and p99 in milliseconds."""
    program = str(make_clients("aiperf").with_name("aiperf"))
    tokenizer = str(tokenizer_folder(model, place))
    words = [
        *("profile", "-m", server.model, "--url", server.url, "--api-key", server.key, "--endpoint-type", "chat"),
        *("--streaming", "--concurrency", str(AT_ONCE), "--request-count", str(ASKED), "--tokenizer", tokenizer),
        *("--prompt-input-tokens-mean", str(QUESTION), "--prompt-output-tokens-mean", str(tokens)),
        *("--use-server-token-count", "--extra-inputs", "ignore_eos:true", "--output-artifact-dir", place),
        *("--ui-type", "none", "--no-auto-plot"),
    ]
    _run([program, *words], place)
    [file] = Path(place).rglob("profile_export_aiperf.json")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    names = {"ttft": "time_to_first_token", "itl": "inter_token_latency", "e2e": "request_latency"}
    figures = {key: (float(found[name]["p50"]), float(found[name]["p99"])) for key, name in names.items()}
    return int(found["request_count"]["avg"]), figures


def guidellm(server: Server, model: Path, tokens: int, place: str) -> tuple[int, dict[str, tuple[float, float]]]:
    """As ``aiperf``."""
    program = str(make_clients("guidellm").with_name("guidellm"))
    backend = {"kind": "openai_http", "target": server.url, "model": server.model, "api_key": server.key,
               "extras": {"body": {"ignore_eos": True}}}  # fmt: skip
    data = {"kind": "synthetic_text", "prompt_tokens": QUESTION, "output_tokens": tokens}
    _run(
        [program, "run", "--backend", json.dumps(backend), "--profile", f"kind=concurrent,streams={AT_ONCE}",
         "--constraint", f"kind=max_requests,count={ASKED}", "--data", json.dumps(data),
         "--tokenizer", json.dumps({"kind": "huggingface_auto", "model": str(tokenizer_folder(model, place))}),
         "--output", "kind=json,path=report.json", "--disable-console"],
        place,
    )  # fmt: skip
    [run] = json.loads((Path(place) / "report.json").read_text(encoding="utf-8"))["benchmarks"]
    metrics = run["metrics"]

    def both(name: str, scale: float) -> tuple[float, float]:
        found = metrics[name]["successful"]["percentiles"]
        return scale * found["p50"], scale * found["p99"]

    figures = {"ttft": both("time_to_first_token_ms", 1), "itl": both("inter_token_latency_ms", 1)}
    return int(metrics["request_totals"]["successful"]), figures | {"e2e": both("request_latency", 1000)}


def load_tools(model: Path, plan: Plan, say: Say) -> list[Row]:
    """Both tools, one after the other, at eight streams."""
    rows = []
    for name, tool in (("aiperf", aiperf), ("guidellm", guidellm)):
        with tempfile.TemporaryDirectory() as place, running(model, "--max-num-seqs", str(AT_ONCE)) as server:
            answered, figures = tool(server, model, plan.tokens, place)
        say(f"tools: {name}: {answered} answered")
        rows.append(Row("tools", f"{name}: answered of {ASKED}", answered, ASKED, "at least"))
        for key, (middle, high) in figures.items():
            rows += [Row("tools", f"{name}: {NAMES[key]}, {share}", value, unit="ms")
                     for share, value in (("p50", middle), ("p99", high))]  # fmt: skip
    return rows
