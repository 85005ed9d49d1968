"""Losses of distillation against TRL 1.16.0's own code: the same logits in float64 give the same numbers.

Compared, each with its gradient by the student's logits: forward KL, reverse KL and generalized JSD over all words with
``GKDTrainer.generalized_jsd_loss`` (beta 0, 1 and between; temperatures), as a mean over the places that carry loss;
and over the k likeliest words and one bucket for all others with ``_add_tail_bucket`` and ``_jsd_divergence`` of its
server distillation. Every option is set. Bar: 1e-6 relative, by the largest number of each kind.

TRL makes the bucket's probability as a difference to one, ours is a sum. What that costs where the bucket has 1e-9 is
shown without a bar, against 50 decimal digits.

    python -m bench.trl_distill [--quick] [--json] [--python .oracles/trl/bin/python]
"""

# S sequences, L their length, V words, K kept

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.oracles import ROOT, python_of

BAR = 1e-6
WORDS, SEQUENCES, LENGTH = 61, 6, 20
BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0}
Arrays = dict[str, npt.NDArray[Any]]
Case = dict[str, Any]


def cases(quick: bool) -> list[Case]:
    """What is computed on both sides; ``kept`` 0 means all words."""
    seeds = [0] if quick else list(range(5))
    named = [("forward_kl", 0.0), ("reverse_kl", 1.0), *(("jsd", beta) for beta in (0.1, 0.5, 0.9))]
    whole = [(name, beta, 0, temperature) for name, beta in named for temperature in (1.0, 2.5)]
    tails = [(name, beta, kept, 1.0) for name, beta in named for kept in (1, 5, 30)]
    keys = ("loss", "beta", "kept", "temperature")
    return [{**dict(zip(keys, each, strict=True)), "seed": seed} for seed in seeds for each in (*whole, *tails)]


def inputs(seed: int) -> Arrays:
    """Logits of both [S, L, V], and where there is loss [S, L]."""
    draw = np.random.default_rng(seed)
    teacher = draw.normal(0, 2, (SEQUENCES, LENGTH, WORDS))
    student = teacher + draw.normal(0, 1, teacher.shape)
    return {"teacher": teacher, "student": student, "mask": draw.random((SEQUENCES, LENGTH)) < 0.7}


def ours(case: Case) -> Arrays:
    """Loss and gradient of what ``sprat distill --logits`` minimizes."""
    import torch

    from sprat.config.teach import LogitsConfig
    from sprat.post import distill_losses

    given = inputs(case["seed"])
    teacher, mask = torch.from_numpy(given["teacher"]), torch.from_numpy(given["mask"])
    student = torch.from_numpy(given["student"]).requires_grad_()
    beta = case["beta"] if case["loss"] == "jsd" else 0.5
    divergence = distill_losses.select_divergence(LogitsConfig(divergence=case["loss"], beta=beta))
    teacher_NV, student_NV = teacher[mask] / case["temperature"], student[mask] / case["temperature"]
    ids_NK = teacher_NV.topk(case["kept"] or WORDS).indices
    buckets = (distill_losses.bucket_log_probs(each, ids_NK) for each in (teacher_NV, student_NV))
    loss = divergence(*buckets).mean()
    loss.backward()
    assert student.grad is not None
    return {"loss": np.array(loss.item()), "gradient": student.grad.numpy()}


def theirs(case: Case) -> Arrays:
    """The same by TRL."""
    import torch
    from trl.experimental.gkd import GKDTrainer
    from trl.experimental.server_distillation import server_distillation_trainer as server

    given = inputs(case["seed"])
    teacher, mask = torch.from_numpy(given["teacher"]), torch.from_numpy(given["mask"])
    student, labels = torch.from_numpy(given["student"]).requires_grad_(), mask.long() - 1 - 99 * (~mask).long()
    if case["kept"]:
        ids = teacher.topk(case["kept"]).indices
        valid = torch.ones_like(ids, dtype=torch.bool)
        said, support = server._add_tail_bucket(student.log_softmax(-1).gather(-1, ids), valid)
        wanted, _ = server._add_tail_bucket(teacher.log_softmax(-1).gather(-1, ids), valid)
        loss = server._jsd_divergence(said, wanted, case["beta"], support)[mask].sum() / mask.sum()
    else:
        loss = GKDTrainer.generalized_jsd_loss(
            student, teacher, labels=labels, beta=case["beta"], temperature=case["temperature"], reduction="batchmean",
            num_items_in_batch=None,
        )  # fmt: skip
    loss.backward()
    return {"loss": np.array(loss.item()), "gradient": student.grad.numpy()}


def worker(path: Path) -> None:
    """In TRL's environment: read cases from ``path``, leave what they give beside it."""
    import trl

    assert trl.__version__ == "1.16.0", trl.__version__
    wanted = json.loads(path.read_text(encoding="utf-8"))
    found = {f"{n}.{name}": value for n, case in enumerate(wanted) for name, value in theirs(case).items()}
    np.savez(path.with_suffix(".npz"), allow_pickle=False, **found)  # type: ignore[arg-type]


def small_tail() -> tuple[float, float]:
    """Relative error of the log of a tail of about 1e-9, ours and as a difference to one, against decimal digits."""
    import decimal

    import torch

    from sprat.post.distill_losses import bucket_log_probs

    logits = [21.0, 0.25, 0.0]
    with decimal.localcontext() as context:
        context.prec = 50
        powers = [decimal.Decimal(each).exp() for each in logits]
        exact = float(((powers[1] + powers[2]) / sum(powers)).ln())
    table = torch.tensor([logits], dtype=torch.float64)
    mine = bucket_log_probs(table, torch.tensor([[0]]))[0, 1].item()
    difference = torch.log(-torch.expm1(table.log_softmax(-1)[0, 0])).item()
    return abs(mine / exact - 1), abs(difference / exact - 1)


def measure(python: Path, quick: bool) -> list[dict[str, Any]]:
    """One row for each loss and quantity: the worst difference over all cases, relative to the largest number."""
    wanted = cases(quick)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cases.json"
        path.write_text(json.dumps(wanted), encoding="utf-8")
        command = [str(python), "-m", "bench.trl_distill", "--worker", str(path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"trl_distill: TRL's side failed\n{done.stderr[-3000:]}")
        found = dict(np.load(path.with_suffix(".npz"), allow_pickle=False))
    worst: dict[tuple[str, str], float] = {}
    for number, case in enumerate(wanted):
        for name, value in ours(case).items():
            reference = found[f"{number}.{name}"]
            figure = float(np.abs(value - reference).max() / np.abs(reference).max())
            key = (f"{case['loss']}{' with a tail' if case['kept'] else ''}", name)
            worst[key] = max(worst.get(key, 0.0), figure)
    return [{"loss": loss, "what": name, "figure": figure, "bar": BAR, "met": figure <= BAR}
            for (loss, name), figure in worst.items()]  # fmt: skip


def main() -> int:
    """Print each difference; 1 where one is above the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--python", type=Path, default=python_of("trl"), help="an interpreter that has TRL 1.16.0")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        worker(asked.worker)
        return 0
    if not asked.python.is_file():
        raise SystemExit(f"trl_distill: no {asked.python}; make it with python -m bench.oracles, or give --python")
    rows = measure(asked.python, asked.quick)
    missed = sum(not row["met"] for row in rows)
    if asked.json:
        print(json.dumps({"bar": BAR, "rows": rows, "missed": missed, "small_tail": small_tail()}))
        return 1 if missed else 0
    for row in rows:
        verdict = "met" if row["met"] else "MISSED"
        print(f"{row['loss']:24} {row['what']:9} {row['figure']:9.1e} relative  bar {BAR:g}: {verdict}")
    print("a tail of 1e-9: ours off by {:.0e}, as a difference to one by {:.0e}".format(*small_tail()))
    print(f"trl_distill: {'MISS' if missed else 'PASS'}: {len(rows) - missed} of {len(rows)} bars met, "
          f"worst {max(row['figure'] for row in rows):.1e} relative (bar {BAR:g})")  # fmt: skip
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
