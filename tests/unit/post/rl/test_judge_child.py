"""What a verifier that stays writes to stderr is kept for its faults, and does not fill the disk."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from sprat.post.rl.judge_child import FunctionChild, LineChild
from sprat.post.rl.rewards import Response
from sprat.tasks import Problem

PROBLEM, ANSWER = Problem("t", 0, "2 + 2?", "4"), Response("", "4", True)
CHATTY = "    print('x' * 400_000, file=sys.stderr, flush=True)\n    if said == 'die': sys.exit('it broke')\n"


@pytest.mark.parametrize("kind", ["function", "command"])
def test_a_judge_that_talks_a_lot_does_not_fill_the_disk(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "judge.py"
    child: FunctionChild | LineChild
    if kind == "function":
        file.write_text(f"import sys\ndef f(problem, answer):\n    said = answer.content\n{CHATTY}    return 1.0\n")
        child = FunctionChild(f"{file}:f", 60.0)
    else:
        loop = "for line in sys.stdin:\n    said = json.loads(line)['response']\n"
        file.write_text(f"import json, sys\n{loop}{CHATTY}    print(1.0, flush=True)\n")
        child = LineChild([sys.executable, str(file)])
    try:
        sizes = []
        for _ in range(12):
            assert child.verdict(PROBLEM, ANSWER, 60.0).reward == 1.0
            sizes.append(os.fstat(child._stderr.fileno()).st_size)
        assert 400_000 < max(sizes) < 2_000_000 and min(sizes[1:]) < max(sizes)
        if kind == "command":
            with pytest.raises(Exception, match="exit code 1: it broke"):
                child.verdict(PROBLEM, Response("", "die", True), 60.0)
    finally:
        child.kill()
