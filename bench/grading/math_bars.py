"""The judge of formulas: math-verify's own tests under load, and hack strings."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.grading import formulas
from sprat.tasks.judge_process import JUDGE_PROCESS
from sprat.tasks.judges import Formula

BUSY_LOOPS = 8
MIN_HACKS = 200


def _spin() -> None:
    while True:
        pass


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """``count`` processes that do nothing but take CPU time."""
    context = multiprocessing.get_context("fork")
    loops = [context.Process(target=_spin, daemon=True) for _ in range(count)]
    for loop in loops:
        loop.start()
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.join()


def verdict(case: dict[str, Any]) -> bool | None:
    """What our pool says of one published case."""
    return JUDGE_PROCESS.verdict("math_verify", case["source"], case["answer"])


def by_itself(case: dict[str, Any]) -> bool:
    """What math-verify says in a process of its own by its own timers of ``SECONDS``: the control."""
    import math_verify

    request = json.loads(case["source"])
    kinds = {"latex": math_verify.LatexExtractionConfig, "expr": math_verify.ExprExtractionConfig}

    def read(text: str, options: dict[str, Any]) -> Any:
        targets = [kinds[kind](**settings) for kind, settings in options.get("targets", [["latex", {}], ["expr", {}]])]
        return math_verify.parse(text, targets)

    gold, answer = read(request["gold"], request["gold_reader"]), read(case["answer"], request["answer_reader"])
    return bool(math_verify.verify(gold, answer, **request["verify"]))


def published(quick: bool, control: bool) -> dict[str, Any]:
    """Math-verify's own cases through our pool, with ``BUSY_LOOPS`` busy loops beside."""
    with tempfile.TemporaryDirectory() as folder:
        cases, others = formulas.published_cases(Path(folder))
    cases = cases[:: 6 if quick else 1]
    start = time.monotonic()
    with busy(BUSY_LOOPS), ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(verdict, cases))
    seconds = time.monotonic() - start
    failed = [case["name"] for case, got in zip(cases, verdicts, strict=True) if got is not case["expected"]]
    facts = {"cases": len(cases), "as_published": len(cases) - len(failed), "failed": failed, "seconds": seconds}
    facts["abstained"], facts["not_of_texts"] = verdicts.count(None), len(others)
    if control:
        with busy(BUSY_LOOPS * 8):
            wrong = [case["name"] for case in cases if by_itself(case) is not case["expected"]]
        facts["control_failed"] = wrong
    return facts


def hack_strings(quick: bool) -> dict[str, Any]:
    """Wrong answers that the judge takes; each subject's own answer first, which it must take."""
    hacks = formulas.hacks()[:: 8 if quick else 1]
    judges = {(hack.question, hack.expected): Formula((hack.expected,), question=hack.question) for hack in hacks}
    refused = [judge.expected for judge in judges.values() if not judge.is_right(f"\\boxed{{{judge.expected}}}")]
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(lambda hack: judges[hack.question, hack.expected].verdict(hack.answer), hacks))
    taken = [(hack.family, hack.expected, hack.answer) for hack, got in zip(hacks, verdicts, strict=True) if got]
    families = Counter(hack.family for hack in hacks)
    return {
        "hacks": len(hacks),
        "families": dict(families),
        "taken": taken,
        "abstained": verdicts.count(None),
        "right_refused": refused,
    }
