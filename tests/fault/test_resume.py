"""kill -9 at any moment, start again: the same weights and the same rows as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sprat.trust import digest

_TRAIN = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from sprat.config import OptimConfig, TrainConfig
from sprat.config.sizes import size
from sprat.data.loader import MixedSource
from sprat.data.pack import pack
from sprat.model import Transformer
from sprat.train import train
from sprat.trust import open_run

torch.set_num_threads(1)
folder = Path(sys.argv[1])
text = b"one sprat and two whales make three fish of very different sizes. " * 20
packed = pack([(list(text[i : i + 50]), None) for i in range(0, len(text), 50)], 32)
optim = OptimConfig(warmup_steps=2)
recipe = TrainConfig(steps=24, batch_rows=4, seq_len=32, checkpoint_every=2, log_every=3, optim=optim)
shape = size("pico", vocab_size=128, hidden_size=32, intermediate_size=48, moe_intermediate_size=16)
run = open_run(folder / "run", stage="pretrain", recipe=recipe, inputs={}, seed=0, ledger=folder / "ledger.jsonl")
print("open", flush=True)
model = Transformer.create(shape, 0)
train(model, MixedSource([(packed, 1.0)], 4, 0), recipe, run)
save_file(model.state_dict(), folder / "weights.safetensors")
print("done", flush=True)
"""

_LIMIT = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000))
"""


def _start(folder: Path) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", _TRAIN, str(folder)], stdout=subprocess.PIPE, text=True, env=environment
    )


def _finish(folder: Path) -> tuple[str, str]:
    """Runs to the end; digests of the weights and of the log."""
    out, _ = _start(folder).communicate(timeout=300)
    assert out.split() == ["open", "done"]
    return digest.file(folder / "weights.safetensors"), digest.file(folder / "run" / "metrics.jsonl")


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    expected = _finish(tmp_path / "whole")
    chance = random.Random(0)
    kills = 0
    for _ in range(6):
        process = _start(tmp_path / "killed")
        assert process.stdout is not None
        process.stdout.readline()  # opened: from here on it trains and writes checkpoints
        time.sleep(chance.uniform(0.05, 0.8))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        process.stdout.close()
    assert kills >= 1
    assert _finish(tmp_path / "killed") == expected


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_disk_that_fills_up_is_one_sentence_and_nothing_half_written(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: the write of the weights fails in its midst."""
    code = _TRAIN.replace("model = Transformer", _LIMIT + "model = Transformer")
    tmp_path.joinpath("f").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "f")], capture_output=True, text=True, check=False
    )
    assert "MachineError: the disk is full" in done.stderr
    assert list((tmp_path / "f" / "run" / "checkpoints").iterdir()) == []
