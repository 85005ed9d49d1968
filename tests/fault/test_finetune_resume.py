"""kill -9 and Ctrl-C at random instants of SFT, LoRA, DPO, RL and a search for the best: it ends with the same bits.

SPRAT_KILLS=20 stops each kind twenty times; SPRAT_KILLS_SEED draws other instants, or those of a failure again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sprat.formats.load import save
from sprat.model import Transformer
from tests.lucky import lucky_shape, lucky_tokenizer

COUNT = int(os.environ.get("SPRAT_KILLS", "5"))
SEED = int(os.environ.get("SPRAT_KILLS_SEED", "1"))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind", ["full", "lora", "dpo", "best", "replay", "rl", "rl lora"])
def test_stopped_at_random_instants_it_ends_with_the_same_bits(kind: str, tmp_path: Path) -> None:
    tokenizer = lucky_tokenizer()
    save(Transformer.create(lucky_shape(tokenizer), 0), tokenizer, tmp_path / "model")
    rows = [{"prompt": str(number), "chosen": "7", "rejected": "3"} for number in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    talks = [{"prompt": str(number), "completion": "7"} for number in range(60)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talks))
    asked = [{"question": f"{number} test", "answer": "7"} for number in range(8)]
    (tmp_path / "ask.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    judge = "def reward(problem, answer):\n    return len(set(answer.content)) / 10\n"
    (tmp_path / "judge.py").write_text(judge)
    (tmp_path / "book.txt").write_text("".join(f"one sprat and {number} whales\n" for number in range(60)))
    script = Path(__file__).with_name("stops.py")
    line = [sys.executable, str(script), str(tmp_path), kind, str(COUNT), str(SEED)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[2])}
    limit = 240 + 20 * COUNT
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment, timeout=limit)
    print(f"SPRAT_KILLS={COUNT} SPRAT_KILLS_SEED={SEED} {kind}: {done.stdout}")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    again = f"again with SPRAT_KILLS={COUNT} SPRAT_KILLS_SEED={SEED}"
    assert not found["faults"], f"{found['faults']}, {again}: {done.stderr[-3000:]}"
    assert len(found["stops"]) == COUNT, f"it was too quick to be stopped, {again}"
