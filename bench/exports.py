# size: one script, with the worker that runs in the other environment
"""What Sprat exports, in other runtimes themselves: what they make of text, weights, logits and greedy answers.

Each model is written by ``sprat.formats.gguf.save`` and loaded by llama.cpp, built by ``bench.oracles``, in float32
(cache included). Three things are held to bars:

- *ids*: texts that llama.cpp cuts into other tokens than our tokenizer, and a chat. Bar: none. A tokenizer that Sprat
  trained is written with the nearest cut that llama.cpp knows, and is held to sums, which come out equal.
- *gap*: mean |log-prob difference| of the tokens of real text, llama.cpp on the F32 file against the model that was
  exported. Bar: 1e-3. And of five prompts, greedy answers of 24 tokens whose text differs. Bar: none.
- *tensors*: those of a quantized file that are not, byte for byte, what llama.cpp's own quantizer makes of the F32
  file. Bar: none.

Gap and answers of other files are shown, against what our reader makes of the same file in float32: beside quantized
weights llama.cpp rounds activations to eight bits, beside F16 to sixteen, and no exporter can help that.

Models: SmolLM2-135M-Instruct, and small random ones of every family whose vocabulary Sprat trained.

Folders (INT4, INT8, FP8) are loaded by transformers with compressed-tensors and by vLLM: see ``bench.export_folders``.

    python -m bench.exports [--runtimes llama,compressed,vllm] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.oracles import ROOT, make_llama

WINDOW, STEPS, THREADS = 128, 24, 2
EXACT = [False, False, False, THREADS]  # no flash attention, no repacked weights: see ``inference.llama_worker``
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, there was a small fish that",
    "Water boils at 100 degrees because",
    "1, 2, 3, 4, 5,",
)
SUMS = [f"{a}+{b}={a + b}\n{a} + {b} - {a} = {b}\n" for a in range(0, 300, 7) for b in (3, 40, 250)]


@dataclass(frozen=True)
class Verdict:
    """One figure and its bar; None: shown only."""

    model: str
    kind: str
    what: str
    figure: float
    bar: float | None

    @property
    def word(self) -> str:
        """What becomes of it."""
        return "shown" if self.bar is None else "met" if self.figure <= self.bar else "MISSED"


@dataclass(frozen=True)
class Case:
    """A model to export: in which kinds beside F32, with which cut, and the texts that are compared."""

    name: str
    make: Callable[[], tuple[Any, Any]]
    kinds: tuple[str, ...]
    pre: str | None
    texts: list[str]


def worker(path: str) -> None:
    """Answer commands about the file ``path``, in llama.cpp's environment."""
    from bench.inference.llama_worker import Llama
    from bench.inference.protocol import serve

    llama = Llama(path)
    api, np = llama.api, llama.np

    def tokenize(text: str, parse_special: bool = False) -> list[int]:
        vocabulary = api.llama_model_get_vocab(llama.model(False))
        content, room = text.encode(), (api.llama_token * (len(text.encode()) + 8))()
        count = api.llama_tokenize(vocabulary, content, len(content), room, len(room), False, parse_special)
        return list(room[:count])

    def log_probs(tokens: list[int]) -> list[float]:
        context = llama.fresh(EXACT, 1, len(tokens), exact=True)
        llama.run(context, [(token, place, 0, True) for place, token in enumerate(tokens)])
        logits = llama.logits(context, len(tokens))[:-1].astype(np.float64)
        top = logits.max(1, keepdims=True)
        log_sum = np.log(np.exp(logits - top).sum(1)) + top[:, 0]
        chosen: list[float] = (logits[np.arange(len(tokens) - 1), tokens[1:]] - log_sum).tolist()
        return chosen

    def greedy(tokens: list[int], steps: int) -> list[int]:
        context = llama.fresh(EXACT, 1, len(tokens) + steps, exact=True)
        answer = llama.fill(context, [tokens])
        while len(answer) < steps:
            llama.run(context, [(answer[-1], len(tokens) + len(answer) - 1, 0, True)])
            answer.append(int(llama.logits(context, 1).argmax()))
        return answer

    def chat(messages: list[dict[str, str]]) -> list[int]:
        import jinja2.sandbox

        template = api.llama_model_chat_template(llama.model(False), None)
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        text = environment.from_string(template.decode()).render(messages=messages, add_generation_prompt=True)
        return tokenize(text, parse_special=True)

    serve({"tokenize": tokenize, "log_probs": log_probs, "greedy": greedy, "chat": chat})


class Worker:
    """A runtime in a process of its own, which answers as ``bench.inference.protocol`` says."""

    def __init__(self, command: Sequence[str | Path], log: Path) -> None:
        self.log = open(log, "w+")  # noqa: SIM115 - closed in ``close``
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, cwd=ROOT
        )

    def ask(self, do: str, **command: Any) -> Any:
        """The worker's answer.

        Raises:
            SystemExit: it died or failed; the end of its log is shown.
        """
        assert self.process.stdin and self.process.stdout
        print(json.dumps({"do": do, **command}), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": "the runtime ended"}
        if isinstance(answer, dict) and "error" in answer:
            self.log.seek(0)
            raise SystemExit(f"{answer['error']}\n{self.log.read()[-2000:]}")
        return answer

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


def llama_cpp(python: Path, path: Path) -> Worker:
    """llama.cpp on one file."""
    return Worker([python, "-m", "bench.exports", "--worker", path], path.with_suffix(".log"))


def real_text() -> list[str]:
    """Topics of Python's help, with lines in other scripts."""
    from sprat.data.sources import python_library
    from sprat.formats.gguf.vocabulary import PROBES

    return [*(document.text[:1500] for document in list(python_library.topics())[::4]), *PROBES]


def random_model(name: str, **shape: Any) -> tuple[Any, Any]:
    """A random model with a vocabulary that Sprat trained, gains, biases and the router's correction random too."""
    import torch

    from sprat.config.sizes import size
    from sprat.model import Transformer
    from sprat.tokens import Tokenizer

    tokenizer = Tokenizer.train([*real_text(), *SUMS], 1024)
    model = Transformer.create(size(name, vocab_size=tokenizer.vocab_size, **shape), 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.dim() == 1:
                tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model, tokenizer


def cases(quick: bool) -> Iterator[Case]:
    """What is exported."""
    import sprat

    def smol() -> tuple[Any, Any]:
        return sprat.load("smol", dequantize=True)

    yield Case("SmolLM2-135M", smol, ("q8_0", "q4_0") if quick else ("f16", "q8_0", "q4_0"), None, real_text())
    mla = {"initializer_range": 0.1, "qk_nope_head_dim": 32, "num_hidden_layers": 3}
    yarn = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}
    v3 = mla | {
        "q_lora_rank": 64, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
        "rope_scaling": {**yarn, "mscale": 1.0, "mscale_all_dim": 1.0},
    }  # fmt: skip
    v2 = mla | {
        "architecture": "deepseek_v2", "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False,
        "rope_scaling": {**yarn, "mscale": 0.707, "mscale_all_dim": 0.707},
    }  # fmt: skip
    dense: dict[str, Any] = {"dense": True, "initializer_range": 0.1, "num_key_value_heads": 2, "head_dim": 32}
    llama3 = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    shapes: dict[str, dict[str, Any]] = {
        "deepseek_v3": v3,
        "deepseek_v3 plain": mla | {"tie_word_embeddings": True},
        "deepseek_v2": v2,
        "deepseek dense": mla | {"dense": True},
        "llama": dense | {"architecture": "llama", "attention_bias": True, "rope_scaling": llama3},
        "qwen2": dense | {"architecture": "qwen2", "attention_bias": True, "rope_scaling": yarn},
        "qwen3": dense | {"architecture": "qwen3", "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    }
    for name, shape in shapes.items():
        kinds = ("q4_0",) if quick else ("q8_0", "q4_0")
        yield Case(name, lambda shape=shape: random_model("micro", **shape), kinds, "superbpe", SUMS)  # type: ignore[misc]


def gap(model: Any, llama: Worker, windows: list[list[int]]) -> float:
    """Mean |difference| of the log-probs of each window's tokens."""
    import torch

    total, count = 0.0, 0
    for window in windows:
        with torch.no_grad():
            log_probs = model(torch.tensor([window]))[0, :-1].double().log_softmax(-1)
        ours = log_probs.gather(1, torch.tensor(window[1:])[:, None])[:, 0].tolist()
        pairs = zip(ours, llama.ask("log_probs", tokens=window), strict=True)
        total += sum(abs(a - b) for a, b in pairs)
        count += len(ours)
    return total / count


def other_tensors(python: Path, plain: Path, ours: Path, kind: str) -> int:
    """How many tensors of ``ours`` are not what llama.cpp's quantizer makes of ``plain``."""
    from sprat.formats.gguf.header import read_header

    theirs = ours.with_name("theirs.gguf")
    command = [str(python), "-m", "bench.inference.requantise", str(plain), str(theirs), kind.upper()]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)

    def contents(path: Path) -> dict[str, tuple[str, bytes]]:
        whole, tensors = path.read_bytes(), read_header(path).tensors
        return {n: (t.kind.name, whole[t.offset : t.offset + t.nbytes]) for n, t in tensors.items()}

    return len({name for name, _ in contents(ours).items() ^ contents(theirs).items()})


def _text(tokenizer: Any, tokens: Sequence[int]) -> str:
    """What ``tokens`` say until one of them ends the answer."""
    text: str = tokenizer.decode(list(itertools.takewhile(lambda token: token not in tokenizer.eos_token_ids, tokens)))
    return text


def measure(case: Case, python: Path, folder: Path, quick: bool) -> Iterator[Verdict]:
    """All figures of one model."""
    import sprat
    from sprat.engine import Engine, Sampling
    from sprat.formats import gguf
    from sprat.tokens import Message, render

    model, tokenizer = case.make()
    ids = [token for text in real_text() for token in tokenizer.encode(text)]
    windows = [ids[at : at + WINDOW] for at in range(0, WINDOW * (2 if quick else 8), WINDOW)]
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    for kind in ("f32", *case.kinds):
        path = folder / f"{kind}.gguf"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gguf.save(model, tokenizer, path, kind=kind, pre=case.pre)  # type: ignore[arg-type]
        held = model if kind == "f32" else sprat.load(path, dequantize=True)[0]
        if kind in ("q8_0", "q4_0"):
            count = other_tensors(python, folder / "f32.gguf", path, kind)
            yield Verdict(case.name, kind, "tensors not as llama.cpp's", count, 0)
        llama = llama_cpp(python, path)
        if kind == "f32":
            differing = sum(llama.ask("tokenize", text=text) != tokenizer.encode(text) for text in case.texts)
            yield Verdict(case.name, kind, f"ids differ, of {len(case.texts)} texts", differing, 0)
            messages = [("user", "3+4?"), ("assistant", "7"), ("user", "8+9?")]
            turns = [Message(role, text) for role, text in messages]  # type: ignore[arg-type]
            chat = llama.ask("chat", messages=[{"role": role, "content": text} for role, text in messages])
            yield Verdict(case.name, kind, "chat prompt differs", chat != render(tokenizer, turns), 0)
        figure = gap(held, llama, windows)
        words = f"mean |log-prob gap|, {len(windows) * (WINDOW - 1)} tokens"
        yield Verdict(case.name, kind, words, figure, 1e-3 if kind == "f32" else None)
        engine = Engine(held, tokenizer, frozen=True, speculate="off")
        answers = engine.generate(prompts, Sampling(temperature=0, max_tokens=STEPS))
        theirs = [llama.ask("greedy", tokens=prompt, steps=STEPS) for prompt in prompts]
        pairs = [(answer.token_ids, tokens) for answer, tokens in zip(answers, theirs, strict=True)]
        other = sum(_text(tokenizer, ours) != _text(tokenizer, tokens) for ours, tokens in pairs)
        bar = 0 if kind == "f32" else None
        yield Verdict(case.name, kind, f"greedy answers differ, of {len(prompts)}", other, bar)
        llama.close()


def _rows(runtimes: Sequence[str], folder: Path, quick: bool, only: tuple[str, ...]) -> Iterator[Verdict]:
    """All figures of ``runtimes``."""
    from bench.export_folders import measure_compressed, measure_vllm
    from bench.oracles import make_compressed, make_vllm

    if "llama" in runtimes:
        python = make_llama()
        for case in cases(quick):
            if not only or case.name.startswith(only):
                yield from measure(case, python, folder, quick)
    if "compressed" in runtimes:
        yield from measure_compressed(make_compressed(), folder)
    if "vllm" in runtimes:
        yield from measure_vllm(make_vllm(), folder, quick)


def main() -> int:
    """Measure and print; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="at most five minutes once llama.cpp is built")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--only", default="", help="names that a model must begin with, by commas")
    parser.add_argument("--runtimes", default="llama,compressed,vllm", help="which, by commas")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        worker(asked.worker)
        return 0
    only = tuple(filter(None, asked.only.split(",")))
    found: list[Verdict] = []
    with tempfile.TemporaryDirectory() as folder:
        for row in _rows(asked.runtimes.split(","), Path(folder), asked.quick, only):
            found.append(row)
            if not asked.json:
                bar = "" if row.bar is None else f"bar {row.bar:g}: "
                print(f"{row.model:18} {row.kind:14} {row.what:40} {row.figure:10.3g}  {bar}{row.word}", flush=True)
    missed = [row for row in found if row.word == "MISSED"]
    if asked.json:
        table = [{**asdict(row), "verdict": row.word} for row in found]
        print(json.dumps({"date": datetime.date.today().isoformat(), "figures": table, "passed": not missed}))
    else:
        bars = sum(row.bar is not None for row in found)
        print(f"exports: {'PASS' if not missed else 'MISS'}, {bars - len(missed)} of {bars} bars met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
