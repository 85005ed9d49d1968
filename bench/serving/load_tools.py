"""aiperf and guidellm, unchanged, against the server: all requests answered, and what they report of it.

Both are many processes: guidellm alone starts eight for eight streams, each of which imports all of it, and one that
makes up questions for as long as it runs (17 processor seconds for 32 requests). On two cores that is taken from the
server, and beside others they starve: at a load of 13 one run took 165 s. So guidellm has one process and as many
questions as it asks, neither is niced, and a row says what share of the cores others took.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.inference.cores import Watch, choose, disturbed
from bench.oracles import make_clients
from bench.serving.rows import Plan, Row, Say
from bench.serving.server import Server, running

AT_ONCE, ASKED, QUESTION = 8, 32, 64  # streams, requests, tokens of a question
SECONDS = 300  # of one tool; on quiet cores each takes half a minute
NAMES = {"ttft": "time to first token", "itl": "between tokens", "e2e": "end to end"}
Figures = dict[str, tuple[float, float]]  # p50 and p99 in milliseconds, by key of NAMES
Tool = Callable[[Server, Path, int, str], tuple[int, Figures]]


def _run(tool: str, words: list[str], place: str, **settings: str) -> None:
    """Run a tool in the folder ``place``. HF_HUB_OFFLINE stays unset: under it aiperf takes a folder for a repository.

    Args:
        settings: more of its environment.

    Raises:
        RuntimeError: it failed or did not end in time; with its last words.
    """
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_OFFLINE")} | settings
    command = [str(make_clients(tool)), "-m", tool, *words]
    log = Path(place) / f"{tool}.out"
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            command,
            cwd=place,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        try:
            status = process.wait(SECONDS)
            ended = f"ended with status {status}" if status else ""
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its workers too
            process.wait()
            ended = f"did not end within {SECONDS} s"
    if ended:
        raise RuntimeError(f"{tool} {ended}: {log.read_text(encoding='utf-8', errors='replace')[-1500:]}")


def tokenizer_folder(model: Path, place: str) -> Path:
    """The model's tokenizer as transformers reads it; both tools make up questions with it."""
    folder = Path(place) / "tokenizer"
    folder.mkdir()
    shutil.copy(model / "tokenizer.json", folder)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "model_max_length": 2048}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def aiperf(server: Server, model: Path, tokens: int, place: str) -> tuple[int, Figures]:
    """Requests that were answered with ``tokens`` tokens each, and how fast."""
    tokenizer = str(tokenizer_folder(model, place))
    words = [
        *("profile", "-m", server.model, "--url", server.url, "--api-key", server.key, "--endpoint-type", "chat"),
        *("--streaming", "--concurrency", str(AT_ONCE), "--request-count", str(ASKED), "--tokenizer", tokenizer),
        *("--prompt-input-tokens-mean", str(QUESTION), "--prompt-output-tokens-mean", str(tokens)),
        *("--use-server-token-count", "--extra-inputs", "ignore_eos:true", "--output-artifact-dir", place),
        *("--ui-type", "none", "--no-auto-plot"),
    ]
    _run("aiperf", words, place)
    [file] = Path(place).rglob("profile_export_aiperf.json")
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    names = {"ttft": "time_to_first_token", "itl": "inter_token_latency", "e2e": "request_latency"}
    figures = {key: (float(report[name]["p50"]), float(report[name]["p99"])) for key, name in names.items()}
    return int(report["request_count"]["avg"]), figures


def guidellm(server: Server, model: Path, tokens: int, place: str) -> tuple[int, Figures]:
    """As ``aiperf``. Counted are requests that were made: its metrics may leave out one that ended last of all."""
    backend = {"kind": "openai_http", "target": server.url, "model": server.model, "api_key": server.key,
               "extras": {"body": {"ignore_eos": True}}}  # fmt: skip
    data = {"kind": "synthetic_text", "prompt_tokens": QUESTION, "output_tokens": tokens}
    tokenizer = {"kind": "huggingface_auto", "model": str(tokenizer_folder(model, place))}
    words = [
        *("run", "--backend", json.dumps(backend), "--profile", f"kind=concurrent,streams={AT_ONCE}"),
        *("--constraint", f"kind=max_requests,count={ASKED}", "--data", json.dumps(data)),
        *("--data-loader", f"kind=pytorch,samples={ASKED},num_workers=1,prefetch_factor={AT_ONCE}"),
        *("--tokenizer", json.dumps(tokenizer), "--output", "kind=json,path=report.json", "--disable-console"),
    ]
    _run("guidellm", words, place, GUIDELLM__MAX_WORKER_PROCESSES="1")
    [run] = json.loads((Path(place) / "report.json").read_text(encoding="utf-8"))["benchmarks"]

    def both(name: str, scale: float) -> tuple[float, float]:
        shares = run["metrics"][name]["successful"]["percentiles"]
        return scale * shares["p50"], scale * shares["p99"]

    figures = {"ttft": both("time_to_first_token_ms", 1), "itl": both("inter_token_latency_ms", 1)}
    made = run["scheduler_metrics"]["requests_made"]
    return int(made["successful"]), figures | {"e2e": both("request_latency", 1000)}


def _measure(tool: Tool, model: Path, tokens: int) -> tuple[int, Figures, dict[str, float]]:
    """What a tool reports of a server of its own, and what others took from the cores meanwhile."""
    with tempfile.TemporaryDirectory() as place, running(model, "--max-num-seqs", str(AT_ONCE)) as server:
        own, watch = sum(server.processor_seconds()) + _children_seconds(), Watch(choose(os.cpu_count() or 1))
        answered, figures = tool(server, model, tokens, place)
        own = sum(server.processor_seconds()) + _children_seconds() - own
        return answered, figures, watch.read(own)


def _children_seconds() -> float:
    """Processor seconds of the processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def load_tools(model: Path, plan: Plan, say: Say) -> list[Row]:
    """Both tools, one after the other, at eight streams; said is the line of docs/api.md."""
    rows = []
    tools: dict[str, Tool] = {"aiperf": aiperf, "guidellm": guidellm}
    for name, tool in tools.items():
        answered, figures, share = _measure(tool, model, plan.tokens)
        cells = [f"{middle:.0f} / {high:.0f}" for middle, high in figures.values()]
        say(f"tools: | {name} | {answered} of {ASKED} | {' | '.join(cells)} |")
        rows.append(Row("tools", f"{name}: answered of {ASKED}", answered, ASKED, "at least"))
        for key, (middle, high) in figures.items():
            rows += [Row("tools", f"{name}: {NAMES[key]}, {percentile}", value, unit="ms")
                     for percentile, value in (("p50", middle), ("p99", high))]  # fmt: skip
        taken = 100 * (share["stolen"] + share["others"])
        note = "the machine was busy" if disturbed(share) else ""
        rows.append(Row("tools", f"{name}: of the cores' time, taken by others", taken, unit="%", note=note))
    return rows
