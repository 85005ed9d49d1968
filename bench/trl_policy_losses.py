"""Losses of RL against TRL's own code: the same logits and advantages in float64 give the same numbers.

What is compared, each with its gradient by the logits: ``grpo``, ``bnpo``, ``dr_grpo``, ``dapo``, ``gspo`` (TRL's
``grpo`` of whole sequences) and ``cispo``; each without a KL, with k3, and with k3 weighed by the ratio; each with and
without the mask of off-policy answers; and the advantages of groups, with and without the deviation. Ours is what
``sprat rl`` minimizes, ``losses.PolicyLoss`` under ``train.losses.policy_loss``. Theirs is ``_compute_loss`` of a
``GRPOTrainer`` built with every option that bears on the loss set explicitly (``use_bias_correction_kl`` among them,
whose default has changed); its log-probabilities are TRL's ``selective_log_softmax``. Bar: 1e-6 relative, by the
largest number of each kind.

    python -m bench.trl_policy_losses [--quick] [--json]
"""

# B answers, L their longest, V words

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

from bench.oracles import ROOT, make_trl
from bench.trl_losses import _tiny

BAR = 1e-6
WORDS, GROUPS, GROUP, LONGEST, MAX_TOKENS = 31, 4, 4, 24, 32
LOW, HIGH, KL_WEIGHT, OFF_POLICY = 0.1, 0.3, 0.2, 0.02
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo")
Arrays = dict[str, npt.NDArray[Any]]


def cases(quick: bool) -> list[dict[str, Any]]:
    """What is computed on both sides."""
    return [
        {"loss": loss, "kl": kl, "mask": mask, "std": std, "seed": seed}
        for seed in range(1 if quick else 5)
        for loss in LOSSES
        for kl in ("off", "k3", "k3 unbiased")
        for mask in (False, True)
        for std in (False, True)
    ]


def inputs(seed: int) -> Arrays:
    """Sampled tokens, their mask [B, L], logits [B, L, V] that lie near those sampled with and referred to, rewards."""
    draw = np.random.default_rng(seed)
    answers = GROUPS * GROUP
    sizes = draw.integers(1, LONGEST + 1, answers)
    logits = draw.normal(0, 2, (answers, LONGEST, WORDS))
    return {
        "ids": draw.integers(3, WORDS, (answers, LONGEST)),
        "mask": (np.arange(LONGEST) < sizes[:, None]).astype(np.int64),
        "logits": logits,
        "sampled": logits + draw.normal(0, 0.2, logits.shape),
        "reference": logits + draw.normal(0, 0.3, logits.shape),
        "rewards": draw.normal(0, 1, (GROUPS, GROUP)).round(1),
    }


def logprobs(logits: Any, ids: Any) -> Any:
    """log p of ``ids`` [B, L]."""
    return logits.log_softmax(-1).gather(2, ids[..., None])[..., 0]


def ours(case: dict[str, Any]) -> Arrays:
    """Loss, its gradient by the logits, and advantages of what ``sprat`` minimizes."""
    import torch

    from sprat.post.rl import losses
    from sprat.train.losses import policy_loss, token_logprob

    given = {name: torch.from_numpy(value) for name, value in inputs(case["seed"]).items()}
    taken = given["mask"].bool()
    sizes = given["mask"].sum(1)
    logits = given["logits"].requires_grad_()
    advantage_B = losses.advantages(given["rewards"], case["std"], sample_std=True, std_epsilon=1e-4).flatten()
    weights = losses.answer_weights(case["loss"], sizes.tolist(), max_tokens=MAX_TOKENS)
    loss = losses.PolicyLoss(
        logprobs(given["sampled"], given["ids"])[taken],
        advantage_B.double().repeat_interleave(sizes),
        torch.tensor(weights, dtype=torch.float64).repeat_interleave(sizes),
        LOW,
        HIGH,
        loss=case["loss"],
        answer_N=torch.arange(len(sizes)).repeat_interleave(sizes),
        off_policy_limit=OFF_POLICY if case["mask"] else None,
    )
    if case["kl"] != "off":
        loss.reference_N, loss.kl_weight = logprobs(given["reference"], given["ids"])[taken], KL_WEIGHT
        loss.kl_ratio = case["kl"] == "k3 unbiased"
    x_NV, head_VV, targets_N = logits[taken], torch.eye(WORDS, dtype=torch.float64), given["ids"][taken]
    surrogate: Any = loss
    if not loss.is_of_tokens:
        surrogate = losses.WholeAnswers(loss, token_logprob(x_NV, head_VV, targets_N)[0])
    total, _, _ = policy_loss(x_NV, head_VV, targets_N, surrogate)
    total.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    found = {"loss": total.detach(), "gradient": logits.grad, "advantages": advantage_B}
    return {name: value.double().numpy() for name, value in found.items()}


def worker(path: str) -> None:
    """In TRL's environment: read cases from ``path``, leave what they give beside it."""
    wanted = json.loads(Path(path).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        for part in _tiny():
            part.save_pretrained(Path(folder, "model"))
        found = {
            f"{number}.{name}": value
            for number, case in enumerate(wanted)
            for name, value in theirs(case, folder).items()
        }
    np.savez(Path(path).with_suffix(".npz"), allow_pickle=False, **found)  # type: ignore[arg-type]


def theirs(case: dict[str, Any], folder: str) -> Arrays:
    """The case by ``GRPOTrainer``."""
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer.utils import selective_log_softmax

    gspo = case["loss"] == "gspo"
    settings = GRPOConfig(
        output_dir=folder, use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False,
        per_device_train_batch_size=GROUPS * GROUP, gradient_accumulation_steps=1, num_iterations=1,
        steps_per_generation=1, num_generations=GROUP, max_completion_length=MAX_TOKENS, temperature=1.0, top_p=1.0,
        loss_type="grpo" if gspo else case["loss"], importance_sampling_level="sequence" if gspo else "token",
        epsilon=LOW, epsilon_high=1 + HIGH if case["loss"] == "cispo" else HIGH, delta=None,
        beta=0.0 if case["kl"] == "off" else KL_WEIGHT, use_bias_correction_kl=case["kl"] == "k3 unbiased",
        scale_rewards="group" if case["std"] else "none",
        off_policy_mask_threshold=OFF_POLICY if case["mask"] else None,
        mask_truncated_completions=False, top_entropy_quantile=1.0, entropy_coef=0.0, use_vllm=False,
        multi_objective_aggregation="sum_then_normalize",
    )  # fmt: skip
    dataset = Dataset.from_list([{"prompt": "w3 w4"}] * GROUPS)
    trainer = GRPOTrainer(
        model=str(Path(folder, "model")), reward_funcs=lambda completions, **_: [0.0] * len(completions), args=settings,
        train_dataset=dataset,
    )  # fmt: skip
    given = {name: torch.from_numpy(value) for name, value in inputs(case["seed"]).items()}
    logits, ids, mask = given["logits"].requires_grad_(), given["ids"], given["mask"]
    zeros = torch.zeros(len(ids), LONGEST, dtype=torch.float64)
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (selective_log_softmax(logits, ids), zeros, None)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    advantages = _advantages(trainer, given["rewards"])
    loss = trainer._compute_loss(
        trainer.model,
        {
            "prompt_ids": ids[:, :1], "prompt_mask": mask[:, :1], "completion_ids": ids, "completion_mask": mask,
            "advantages": advantages, "old_per_token_logps": selective_log_softmax(given["sampled"], ids),
            "ref_per_token_logps": selective_log_softmax(given["reference"], ids), "num_items_in_batch": mask.sum(),
        },
    )  # fmt: skip
    loss.backward()
    return {"loss": loss.detach().numpy(), "gradient": logits.grad.numpy(), "advantages": advantages.numpy()}


def _advantages(trainer: Any, rewards: Any) -> Any:
    """What ``GRPOTrainer`` makes of rewards in float64: its own method, with answers and rewards put under it."""
    import torch

    answers = GROUPS * GROUP
    generated = ([[3, 4]] * answers, [[5, 1]] * answers, None, ["w5"] * answers, None, {}, None, None)
    trainer._generate = lambda prompts: generated
    trainer._calculate_rewards = lambda *_, **__: rewards.view(-1, 1)
    trainer.reward_weights = torch.ones(1, dtype=torch.float64)
    with torch.no_grad():
        return trainer._generate_and_score_completions([{"prompt": "w3 w4"} for _ in range(answers)])["advantages"]


def main() -> int:
    """Print the largest relative gap of each kind; 1 where it is above the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed instead of five")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        worker(asked.worker)
        return 0
    wanted = cases(asked.quick)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cases.json")
        path.write_text(json.dumps(wanted), encoding="utf-8")
        command = [str(make_trl()), "-m", "bench.trl_policy_losses", "--worker", str(path)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        told = dict(np.load(path.with_suffix(".npz")))
    worst = dict.fromkeys(LOSSES, 0.0)
    for number, case in enumerate(wanted):
        for name, value in ours(case).items():
            expected = told[f"{number}.{name}"]
            gap = float(np.abs(value - expected).max() / np.abs(expected).max())
            worst[case["loss"]] = max(worst[case["loss"]], gap)
    missed = [name for name, gap in worst.items() if not gap <= BAR]
    if asked.json:
        print(json.dumps({"cases": len(wanted), "bar": BAR, "worst": worst, "missed": missed}))
    else:
        for name, gap in worst.items():
            print(f"{name:8} largest relative gap {gap:.1e}  bar {BAR:g}: {'met' if gap <= BAR else 'MISSED'}")
        verdict = "MISS" if missed else "PASS"
        print(f"trl_policy_losses: {verdict}: {len(worst) - len(missed)} of {len(worst)} losses, {len(wanted)} cases")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
