"""kill -9 and Ctrl-C in the middle of SFT, LoRA, DPO and a search for the best: it ends with the same bits."""

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

# One process imports torch; each attempt at training is a fork of it, and dies as a process does.
_CODE = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from sprat.config.finetune import DPOConfig, FinetuneConfig
from sprat.files import digest
from sprat.post.finetune import finetune

torch.set_num_threads(1)
base, kind = Path(sys.argv[1]), sys.argv[2]
settings = {"epochs": 6, "seq_len": 32, "checkpoint_every": 2, "log_every": 3, "optim": {"adam_lr": 0.01}}
best = {"keep_best": True, "patience": 40, "best_metric": "ask", "eval_every": 1, "checkpoint_every": 5}
lora = {"lora": {"rank": 2, "dora": True}} if kind == "lora" else best if kind == "best" else {}
config = (DPOConfig if kind == "dpo" else FinetuneConfig).model_validate(settings | lora)
data = base / ("pairs.jsonl" if kind == "dpo" else "talks.jsonl")

def attempt(name):
    child = os.fork()
    if child == 0:
        try:
            tasks = [str(base / "ask.jsonl")] if kind == "best" else []
            finetune(base / "model", data, base / name / "run", config, eval_tasks=tasks)
        except KeyboardInterrupt:
            os._exit(130)
        os._exit(0)
    return child

def ended(name):
    assert os.waitpid(attempt(name), 0)[1] == 0
    run = base / name / "run"
    facts = json.loads((run / "run.json").read_text())["facts"]
    metrics = digest.of_file(run / "metrics.jsonl")
    names = ("validation_before", "validation_after", "best", "last_step")
    return [digest.of_folder(run / "artefact"), metrics, *(facts.get(name) for name in names)]

def newest(name):
    steps = (base / name).glob("run/checkpoints/step-*")
    return max((int(path.name[5:]) for path in steps), default=0)

whole = ended("whole")
chance, stopped = random.Random(1), []
for number, least in enumerate((0, 2, 6, 10, 14)):
    child = attempt("killed")
    while newest("killed") < least and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.05))
    os.kill(child, signal.SIGINT if number % 2 else signal.SIGKILL)
    stopped.append(os.waitpid(child, 0)[1])
print(json.dumps({"stopped": stopped, "whole": whole, "killed": ended("killed")}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kind", ["full", "lora", "dpo", "best"])
def test_stopped_at_random_moments_it_ends_with_the_same_bits(kind: str, tmp_path: Path) -> None:
    tokenizer = lucky_tokenizer()
    save(Transformer.create(lucky_shape(tokenizer), 0), tokenizer, tmp_path / "model")
    rows = [{"prompt": str(number), "chosen": "7", "rejected": "3"} for number in range(40)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    talks = [{"prompt": str(number), "completion": "7"} for number in range(60)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talks))
    asked = [{"question": f"{number} test", "answer": "7"} for number in range(8)]
    (tmp_path / "ask.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    line = [sys.executable, "-c", _CODE, str(tmp_path), kind]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert sum(code != 0 for code in found["stopped"]) >= 3, "it was too quick to be stopped"
    assert found["killed"] == found["whole"]
