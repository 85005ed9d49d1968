"""kill -9 at any moment, start again: the same weights and the same rows as if nothing had happened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# One process imports torch; each attempt at training is a fork of it, and dies as a process does.
_TRAIN = """
import json, os, random, resource, signal, sys, time
from pathlib import Path
import torch
from safetensors.torch import save_file
from sprat.config import OptimConfig, TrainConfig
from sprat.config.sizes import size
from sprat.data.loader import MixedBatchSource
from sprat.data.pack import pack
from sprat.files import digest
from sprat.model import Transformer
from sprat.train import train
from sprat.trust import open_run

torch.set_num_threads(1)
base = Path(sys.argv[1])
text = b"one sprat and two whales make three fish of very different sizes. " * 20
packed = pack([(list(text[i : i + 50]), None) for i in range(0, len(text), 50)], 32)
optim = OptimConfig(warmup_steps=2)
recipe = TrainConfig(steps=24, batch_rows=4, seq_len=32, checkpoint_every=2, log_every=3, optim=optim)
shape = size("pico", vocab_size=128, hidden_size=32, intermediate_size=48, moe_intermediate_size=16)

def work(folder):
    run = open_run(folder / "run", stage="pretrain", recipe=recipe, inputs={}, seed=0, ledger=folder / "ledger.jsonl")
    model = Transformer.create(shape, 0)
    train(model, MixedBatchSource([(packed, 1.0)], 4, 0), recipe, run)
    save_file(model.state_dict(), folder / "weights.safetensors")

def attempt(folder):
    folder.mkdir(exist_ok=True)
    child = os.fork()
    if child == 0:
        work(folder)
        os._exit(0)
    return child

def ended(folder):
    assert os.waitpid(attempt(folder), 0)[1] == 0
    return [digest.of_file(folder / "weights.safetensors"), digest.of_file(folder / "run" / "metrics.jsonl")]
"""
_KILL = """
def newest(folder):
    return max((int(path.name[5:]) for path in folder.glob("run/checkpoints/step-*")), default=0)

whole = ended(base / "whole")
chance, kills = random.Random(0), 0
for least in (0, 2, 6, 10, 14, 18):
    child = attempt(base / "killed")
    while newest(base / "killed") < least:
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    kills += os.waitpid(child, 0)[1] == signal.SIGKILL
print(json.dumps({"kills": kills, "whole": whole, "killed": ended(base / "killed")}))
"""
_FULL = """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000))
work(base)
"""


def _python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", _TRAIN + code, str(folder)], capture_output=True, text=True, check=False, env=environment
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    done = _python(_KILL, tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] >= 5
    assert found["killed"] == found["whole"]


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_disk_that_fills_up_is_one_sentence_and_nothing_half_written(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: the write of the weights fails in its midst."""
    done = _python(_FULL, tmp_path)
    assert "MachineError: the disk is full" in done.stderr
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
