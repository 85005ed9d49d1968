"""What INT4 takes from a model that has just learned a task, by the commands a user would type.

The model is that of ``bench.finetune_gain --keep FOLDER`` (``--mode`` says which): SmolLM2-135M-Instruct with sums and
differences of two numbers, 46 % of which it gets right, so that every other answer lies near an edge. It is calibrated
on what it was trained on, the very conversations, and on text: docstrings, and manual pages in Chinese other than those
that are asked. What is asked are all questions of a part that no training saw: there are some 1,600 in all.

Bar: the upper end of the 95 % interval of each capability's loss is at most 5 %. Settings were chosen on other
questions.

    python -m bench.finetune_int4 FOLDER [--split test] [--mode lora] [--out NAME] [--set KEY=VALUE ...] [--json]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from bench.finetune_gain import PARTS, problems, sprat

MAX_LOSS = "5%"
DRAWN = 60_000  # questions; nearly all that there are of two numbers of two digits
TEXT_CHARS = 300_000  # of each language
ASKED_PAGES = 100  # manual pages that certify may ask
SETTINGS = ("tune_steps=200",)


def write_files(folder: Path, split: str) -> None:
    """Leave ``calibrate/`` and ``asked/chain_sum.jsonl`` in ``folder``."""
    from sprat.data.sources import chinese_manual, python_library
    from sprat.data.sources.source import SourceRequest

    calibrate, asked = folder / "calibrate", folder / "asked"
    for each in (calibrate, asked):
        each.mkdir(exist_ok=True)
    shutil.copyfile(folder / "chat.jsonl", calibrate / "chat.jsonl")
    docstrings = [each for each in python_library.documents() if each.domain != "code"]
    pages = _shuffled(chinese_manual.PACKAGE.read(SourceRequest()).documents)[ASKED_PAGES:]  # certify asks the first
    for name, documents in (("english", _shuffled(docstrings)), ("chinese", pages)):
        rows, size = [], 0
        for document in documents:
            if size < TEXT_CHARS:
                rows.append(json.dumps({"text": document.text}, ensure_ascii=False))
                size += len(document.text)
        (calibrate / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    questions = problems(drawn=DRAWN, asked=DRAWN)[split]
    rows = [json.dumps({**each, "judge": "numeric"}) for each in questions]
    (asked / "chain_sum.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def _shuffled(documents: Any) -> list[Any]:
    """In an order that their names alone decide, that of ``sprat certify``."""
    return sorted(documents, key=lambda document: hashlib.sha256(document.id.encode()).digest())


def measure(folder: Path, split: str, mode: str, out: str, settings: list[str]) -> dict[str, Any]:
    """The certificate, and what quantizing told."""
    write_files(folder, split)
    model, options = f"runs/{mode}", [word for each in settings for word in ("--set", each)]
    if (folder / out).exists():
        shutil.rmtree(folder / out)
    told = sprat(folder, "quantize", model, "--out", out, "--calibrate", "calibrate", *options)
    words = ["--task", "asked/chain_sum.jsonl", "--max-tokens", "48", "--prompts", "8", "--no-speed"]
    return {"quantize": told, "certificate": sprat(folder, "certify", out, "--against", model, *words)}


def rows_of(certificate: dict[str, Any]) -> list[dict[str, Any]]:
    """Name, loss and interval of each capability."""
    tasks = [{"name": each["answers"]["task"], **each["loss"]} for each in certificate["tasks"]]
    return tasks + [{"name": each["name"], **each["loss"]} for each in certificate["texts"]]


def main() -> int:
    """Print each capability's loss; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what bench.finetune_gain --keep left")
    parser.add_argument("--split", choices=PARTS[1:], default="test", help="which questions are asked (dev: to tune)")
    parser.add_argument("--mode", choices=("lora", "full"), default="lora", help="which of the two runs")
    parser.add_argument("--out", default="int4", help="the quantized model's name in the folder")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="of sprat quantize (tune_steps=200)")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    measured = measure(asked.folder, asked.split, asked.mode, asked.out, asked.set or list(SETTINGS))
    limit = float(MAX_LOSS.rstrip("%")) / 100
    rows = rows_of(measured["certificate"])
    missed = [row for row in rows if row["high"] > limit]
    if asked.json:
        print(json.dumps({"split": asked.split, "rows": rows, "missed": len(missed), **measured}))
        return 1 if missed else 0
    for row in rows:
        verdict = "met" if row["high"] <= limit else "MISSED"
        interval = f"{row['low']:+7.1%} to {row['high']:+7.1%}, of {row['count']:,}"
        print(f"{row['name']:40} {row['value']:+7.1%} ({interval})  bar {MAX_LOSS}: {verdict}")
    print(f"{asked.out}: {measured['quantize']['size_bytes'] / 1e6:.1f} MB")
    print(f"finetune_int4: {'MISS' if missed else 'PASS'}: {len(rows) - len(missed)} of {len(rows)} bars met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
