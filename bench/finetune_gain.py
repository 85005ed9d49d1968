"""What a fine-tuning of SmolLM2-135M-Instruct on a file gains and what it forgets, by the commands a user would type.

The file holds reasoning-gym's chain_sum: sums and differences of two numbers of two digits. What is asked afterwards
is held out by content: no question of it stands in the file, in whatever seed it was drawn. The model is trained with
adapters and with all weights, with a quarter of the rows replayed from the docstrings of the Python library; what it
has forgotten is measured on other text, Python's language reference, in bits per byte.

Bars: at least 20 points more on the held-out questions, the 95 % interval of the paired difference above 0, in at most
30 minutes of training; at most 0.02 bits per byte more on the text. Settings were chosen on ``--split dev``.

    python -m bench.finetune_gain [--split test] [--quick] [--json] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MIN_GAIN, MAX_MINUTES, MAX_BITS = 0.20, 30.0, 0.02
TRAIN, ASKED = 2000, 400
TEXT_BYTES = {"replay": 400_000, "reference": 150_000}
SETTINGS = {
    "lora": ["--lora", "16", "--set", "epochs=1"],
    "full": ["--set", "epochs=1"],
}
PARTS = ("train", "dev", "test")


def problems(drawn: int = 12_000, asked: int = ASKED) -> dict[str, list[dict[str, str]]]:
    """Questions and answers of each part; a hash of the question alone decides which.

    Args:
        drawn: how many are drawn, some of them more than once; the first are the same whatever it is.
        asked: how many of dev and of test are kept at most.
    """
    import reasoning_gym

    size = {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}
    entries = reasoning_gym.create_dataset("chain_sum", seed=7, size=drawn, **size)
    parts: dict[str, list[dict[str, str]]] = {name: [] for name in PARTS}
    answers = {entry["question"]: str(entry["answer"]) for entry in entries}
    for question, answer in answers.items():
        place = hashlib.sha256(question.encode()).digest()[0] % 10
        parts["dev" if place == 0 else "test" if place == 1 else "train"].append(
            {"question": question, "answer": answer}
        )
    return {name: listed[: TRAIN if name == "train" else asked] for name, listed in parts.items()}


def write_files(folder: Path, split: str) -> None:
    """Leave ``chat.jsonl``, ``chain_sum.jsonl``, ``replay.txt`` and ``reference.txt`` in ``folder``."""
    from sprat.data.sources import python_library

    parts = problems()
    rows = [{"prompt": each["question"], "completion": each["answer"]} for each in parts["train"]]
    (folder / "chat.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    asked = [{**each, "judge": "numeric"} for each in parts[split]]
    (folder / "chain_sum.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in asked), encoding="utf-8")
    for name, documents in (("replay", python_library.documents()), ("reference", python_library.topics())):
        taken, size = [], 0
        for document in documents:
            if document.domain != "code" and size < TEXT_BYTES[name]:
                taken.append(document.text)
                size += len(document.text.encode())
        (folder / f"{name}.txt").write_text("\n\n".join(taken), encoding="utf-8")


def sprat(folder: Path, *words: str) -> dict[str, Any]:
    """What a command prints.

    Raises:
        RuntimeError: it failed; with its last words.
    """
    command = [sys.executable, "-m", "sprat", *words, "--json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure(folder: Path, split: str, quick: bool) -> list[dict[str, Any]]:
    """Three rows for each way to train."""
    write_files(folder, split)
    asking = ["--task", "chain_sum.jsonl", "--max-tokens", "48", *(["--count", "100"] if quick else [])]
    before = sprat(folder, "eval", "smol", *asking)
    (folder / "before.json").write_text(json.dumps(before), encoding="utf-8")
    bits = sprat(folder, "eval", "smol", "--text", "reference.txt")["text"]["bits_per_byte"]
    rows = []
    for mode in ("lora",) if quick else SETTINGS:
        began = time.monotonic()
        settings = [*SETTINGS[mode], "--replay", "replay.txt", "--out", f"runs/{mode}"]
        sprat(folder, "sft", "smol", "--data", "chat.jsonl", *settings)
        minutes = (time.monotonic() - began) / 60
        [gain] = sprat(folder, "eval", f"runs/{mode}", *asking, "--against", "before.json")["comparisons"]
        after = sprat(folder, "eval", f"runs/{mode}", "--text", "reference.txt")["text"]["bits_per_byte"]
        interval = {"low": gain["low"], "high": gain["high"], "before": gain["first"], "after": gain["second"]}
        met = gain["difference"] >= MIN_GAIN and gain["low"] > 0
        rows.append(
            {"mode": mode, "what": "gain", "figure": gain["difference"], "bar": MIN_GAIN, "met": met, **interval}
        )
        rows.append(
            {"mode": mode, "what": "minutes", "figure": minutes, "bar": MAX_MINUTES, "met": minutes <= MAX_MINUTES}
        )
        lost = after - bits
        rows.append({"mode": mode, "what": "bits per byte", "figure": lost, "bar": MAX_BITS, "met": lost <= MAX_BITS,
                     "before": bits, "after": after})  # fmt: skip
    return rows


def main() -> int:
    """Print each figure; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=PARTS[1:], default="test", help="which questions are asked (dev: to tune)")
    parser.add_argument("--quick", action="store_true", help="adapters alone, a hundred questions")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--keep", type=Path, help="leave files and runs in this folder")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = asked.keep or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        rows = measure(folder, asked.split, asked.quick)
    missed = [row for row in rows if not row["met"]]
    if asked.json:
        print(json.dumps({"split": asked.split, "rows": rows, "missed": len(missed)}))
        return 1 if missed else 0
    for row in rows:
        among = f" ({row['before']:.3f} to {row['after']:.3f})" if "before" in row else ""
        interval = f" [{row['low']:+.3f}, {row['high']:+.3f}]" if "low" in row else ""
        verdict = "met" if row["met"] else "MISSED"
        print(f"{row['mode']:5} {row['what']:14} {row['figure']:+.3f}{interval}{among}  bar {row['bar']}: {verdict}")
    print(f"finetune_gain: {'MISS' if missed else 'PASS'}: {len(rows) - len(missed)} of {len(rows)} bars met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
