"""The walk of docs/finetune.md, timed: a file of conversations, adapters for SmolLM2, questions, a GGUF, llama.cpp.

200 conversations about Python's standard library, of 150 tokens at most, are trained for three epochs; each step is one
command, as the page has it. Bars: 15 minutes from the first command to llama.cpp's answer, and a validation loss that
falls.

    python -m bench.finetune_walk [--json] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.oracles import make_llama

COUNT, MAX_TOKENS, MAX_MINUTES = 200, 150, 15.0
MODULES = ("json", "shutil", "statistics", "textwrap", "random", "os", "os.path", "math", "itertools", "functools",
           "heapq", "bisect", "glob", "fnmatch", "string", "re", "time", "calendar", "csv", "copy", "tempfile",
           "subprocess", "inspect", "ast", "base64", "binascii", "cmath", "collections", "contextlib", "dis", "gzip",
           "hashlib", "html", "ipaddress", "linecache", "locale", "operator", "pickle", "platform", "pprint", "secrets",
           "shlex", "signal", "socket", "ssl", "struct", "sys", "threading", "tokenize", "traceback", "types",
           "unicodedata", "urllib.parse", "uuid", "warnings", "weakref", "zlib")  # fmt: skip
ANSWER = """
import json, sys
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=1024, verbose=False)
turns = [{"role": "user", "content": sys.argv[2]}]
print(json.dumps(model.create_chat_completion(turns, max_tokens=64, temperature=0.0)["choices"][0]))
"""


def questions() -> list[list[dict[str, str]]]:
    """What functions of the library do, by the first paragraph of their docstrings, as a turn of each side."""
    pairs = []
    for module in MODULES:
        for name, function in inspect.getmembers(importlib.import_module(module), callable):
            said = (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " ")
            if name.startswith("_") or not 30 < len(said) < 600 or getattr(function, "__module__", module) != module:
                continue
            asked = {"role": "user", "content": f"What does Python's {module}.{name} do?"}
            pairs.append([asked, {"role": "assistant", "content": said}])
    return pairs


def conversations(fits: Callable[[list[dict[str, str]]], bool]) -> list[dict[str, Any]]:
    """Of two questions each."""
    pairs = questions()
    talks = [a + b for a, b in zip(pairs[::2], pairs[1::2], strict=False) if fits(a + b)]
    return [{"messages": talk} for talk in talks[:COUNT]]


def measure(folder: Path, llama: Path) -> dict[str, Any]:
    """Walk, and say how long each step took."""
    from sprat.formats.load import load, locate
    from sprat.tokens.chat import Message, render

    tokenizer = load(locate("smol"))[1]
    rows = conversations(lambda turns: len(render(tokenizer, [Message(**turn) for turn in turns])) <= MAX_TOKENS)
    (folder / "chat.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    asked = [{"question": row["messages"][0]["content"], "answer": row["messages"][1]["content"]} for row in rows[::10]]
    (folder / "questions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in asked), encoding="utf-8")
    steps = {
        "sft": "sft smol --data chat.jsonl --lora 16 --out runs/mine",
        "eval": "eval runs/mine --task questions.jsonl --max-tokens 64",
        "export": "export runs/mine --gguf mine.gguf --kind q8_0",
    }
    seconds = {}
    for name, words in steps.items():
        began = time.monotonic()
        command = [sys.executable, "-m", "sprat", *words.split()]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds[name] = time.monotonic() - began
    began = time.monotonic()
    command = [str(llama), "-c", ANSWER, str(folder / "mine.gguf"), asked[0]["question"]]
    answer = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    seconds["llama.cpp"] = time.monotonic() - began
    facts = json.loads((folder / "runs" / "mine" / "run.json").read_text())["facts"]
    losses = [facts[name]["loss"] for name in ("validation_before", "validation_after")]
    return {"conversations": len(rows), "minutes": sum(seconds.values()) / 60, "seconds": seconds, "losses": losses,
            "question": asked[0]["question"], "answer": answer["message"]["content"],
            "finish_reason": answer["finish_reason"]}  # fmt: skip


def main() -> int:
    """Print times, losses and the answer; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=Path, help="leave files and runs in this folder")
    options = parser.parse_args()
    llama = make_llama()
    with tempfile.TemporaryDirectory() as place:
        folder = options.keep or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        found = measure(folder, llama)
    met = found["minutes"] <= MAX_MINUTES and found["losses"][1] < found["losses"][0] and bool(found["answer"])
    if options.json:
        print(json.dumps({**found, "met": met}))
        return 0 if met else 1
    print(
        f"{found['conversations']} conversations; " + ", ".join(f"{k} {v:.0f} s" for k, v in found["seconds"].items())
    )
    print("validation loss {:.3f} to {:.3f}".format(*found["losses"]))
    print(f"llama.cpp: {found['question']} {found['answer']} ({found['finish_reason']})")
    print(f"finetune_walk: {'PASS' if met else 'MISS'}: {found['minutes']:.1f} minutes (bar {MAX_MINUTES:g})")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
