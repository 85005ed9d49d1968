"""kill -9 and Ctrl-C in the middle of pre-training on a user's text: started again, it ends with the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_CODE = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from sprat.config.pretrain import load_pretrain_config
from sprat.files import digest
from sprat.train.pretrain import pretrain

torch.set_num_threads(1)
base = Path(sys.argv[1])
shape = {"hidden_size": 32, "num_hidden_layers": 1, "first_k_dense_replace": 0, "num_attention_heads": 2,
         "n_routed_experts": 4, "moe_intermediate_size": 32, "intermediate_size": 64}
table = {"changes": shape, "vocab_size": 500, "seq_len": 32, "batch_rows": 8, "steps": 40, "checkpoint_every": 2}
config = load_pretrain_config(size="pico", table=table)

def attempt(name):
    child = os.fork()
    if child == 0:
        try:
            pretrain(None, base / "text", base / name / "run", config)
        except KeyboardInterrupt:
            os._exit(130)
        os._exit(0)
    return child

def ended(name):
    assert os.waitpid(attempt(name), 0)[1] == 0
    run = base / name / "run"
    facts = json.loads((run / "run.json").read_text())["facts"]
    metrics = digest.of_file(run / "metrics.jsonl")
    return [digest.of_folder(run / "artefact"), metrics, facts["validation_before"], facts["validation_after"]]

def newest(name):
    steps = (base / name).glob("run/checkpoints/step-*")
    return max((int(path.name[5:]) for path in steps), default=0)

whole = ended("whole")
chance, stopped = random.Random(1), []
for number, least in enumerate((0, 2, 10, 20, 30)):
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
def test_stopped_at_random_moments_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for number in range(30):
        words = " ".join(f"fish {number * place % 7}" for place in range(40))
        (tmp_path / "text" / f"{number}.txt").write_text(f"{number}: {words}\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", _CODE, str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert sum(code != 0 for code in found["stopped"]) >= 3, "it was too quick to be stopped"
    assert found["killed"] == found["whole"]
