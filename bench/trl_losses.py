"""Losses of fine-tuning against TRL's own code: the same logits and labels in float64 give the same numbers.

What is compared, each with its gradient by the logits: the cross-entropy of SFT, over a whole batch and over one cut
into two micro-batches; and DPO's ``sigmoid``, ``sigmoid_norm`` and ``ipo`` at several betas, with the margins and the
accuracy of their rewards. Ours is what ``sprat sft`` and ``sprat dpo`` minimize, on rows as they are packed there.
Theirs is ``compute_loss`` of a ``SFTTrainer`` and a ``DPOTrainer``, built with every option that bears on the loss set
explicitly, over padded rows; the log-probabilities are TRL's ``selective_log_softmax``. Bar: 1e-6 relative, by the
largest number of each kind.

TRL's own head computes in float32 whatever it is given. Its trainers are run with it too, on the same numbers; that
row is shown without a bar.

    python -m bench.trl_losses [--quick] [--json]
"""

# S sequences, L their longest, V words; B rows, T places of a row

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

BAR = 1e-6
WORDS, SEQUENCES, LONGEST = 61, 8, 40
Arrays = dict[str, npt.NDArray[Any]]


def cases(quick: bool) -> list[dict[str, Any]]:
    """What is computed on both sides; ``head``: theirs by their own head, in float32."""
    seeds, betas = ([0], [0.1]) if quick else (range(5), [0.02, 0.1, 1.0])
    listed: list[dict[str, Any]] = []
    for seed in seeds:
        listed += [{"loss": "sft", "parts": parts, "seed": seed, "head": False} for parts in (1, 2)]
        listed += [
            {"loss": name, "beta": beta, "seed": seed, "head": False}
            for name in ("sigmoid", "sigmoid_norm", "ipo")
            for beta in betas
        ]
    return [*listed, {"loss": "sft", "parts": 1, "seed": 0, "head": True}]


def inputs(seed: int) -> Arrays:
    """Sequences with a prompt that carries no loss: ids and mask [S, L], lengths [S], logits and the reference's
    [S, L, V]. As pairs, number i and number S/2 + i are the chosen and the rejected answer to one prompt."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(3, WORDS, (SEQUENCES, LONGEST))
    lengths = draw.integers(8, LONGEST + 1, SEQUENCES)
    prompts = draw.integers(1, 6, SEQUENCES // 2)
    mask = np.zeros_like(ids)
    for row in range(SEQUENCES):
        mask[row, prompts[row % len(prompts)] : lengths[row]] = 1
        ids[row, : prompts[row % len(prompts)]] = ids[row % len(prompts), : prompts[row % len(prompts)]]
    logits = draw.normal(0, 3, (SEQUENCES, LONGEST, WORDS))
    reference = logits + draw.normal(0, 0.3, logits.shape)
    return {"ids": ids, "lengths": lengths, "mask": mask, "logits": logits, "reference": reference}


def ours(case: dict[str, Any]) -> Arrays:
    """Loss, gradient by the logits and metrics of what ``sprat`` minimizes."""
    import torch

    from sprat.config.finetune import DPOConfig, FinetuneConfig
    from sprat.data import loader, pack
    from sprat.post import dpo, examples
    from sprat.train import losses

    given = inputs(case["seed"])
    sequences = [
        (ids[:n].tolist(), mask[:n].tolist())
        for ids, mask, n in zip(given["ids"], given["mask"], given["lengths"], strict=True)
    ]
    logits_SLV = torch.from_numpy(given["logits"]).requires_grad_()
    if case["loss"] == "sft":
        width = 2 * LONGEST
        packed, config = pack.pack(sequences, width), FinetuneConfig()
        sequence_BT = pack.document_ids(given["lengths"].tolist(), width)
        loss_fn: losses.LossFn = losses.next_token_loss
    else:
        pairs, width = SEQUENCES // 2, 2 * LONGEST
        packed = examples.pack_pairs(list(zip(sequences[:pairs], sequences[pairs:], strict=True)), width)
        config = DPOConfig(loss=case["loss"], beta=case["beta"])
        sequence_BT = np.arange(pairs)[:, None] + pairs * (packed.segments == examples.REJECTED)
        logprob_SLV = torch.from_numpy(given["reference"]).log_softmax(-1)
        target_SL1 = torch.from_numpy(given["ids"])[:, 1:, None]
        each_SL = logprob_SLV[:, :-1].gather(2, target_SL1)[..., 0] * torch.from_numpy(given["mask"])[:, 1:]
        chosen_B, rejected_B = each_SL.sum(1).split(pairs)
        loss_fn = dpo.preference_loss(config, lambda batch: (chosen_B, rejected_B))
    place_BT = _places(packed.segments)
    x_BTV = logits_SLV[torch.from_numpy(sequence_BT.clip(0)), torch.from_numpy(place_BT)][:, :-1]
    batch, rows = loader.gather_rows(packed, range(packed.num_rows)), packed.num_rows
    cuts = [0, rows] if case.get("parts", 1) == 1 else [0, rows // 2, rows]
    shares = [
        loss_fn(_Logits(x_BTV[a:b]), batch[a:b], config, batch)  # type: ignore[arg-type]
        for a, b in zip(cuts[:-1], cuts[1:], strict=True)
    ]
    torch.stack([share.total for share in shares]).sum().backward()  # type: ignore[no-untyped-call]
    assert logits_SLV.grad is not None
    found: Arrays = {"loss": np.array(sum(share.metrics["loss"] for share in shares))}
    found["gradient"] = logits_SLV.grad.numpy()
    if case["loss"] != "sft":
        found |= {name: np.array(shares[0].metrics[f"reward_{name}"]) for name in ("margin", "accuracy")}
    return found


class _Logits:
    """A model whose hidden states are the logits that we choose, and whose head is the identity."""

    mtp: tuple[()] = ()
    compute_dtype = None

    def __init__(self, x_BTV: Any) -> None:
        self._x_BTV, self.head = x_BTV, self

    def hidden(self, tokens_BT: Any, segments_BT: Any = None) -> Any:
        """The logits, whatever the tokens are."""
        from sprat.model import Hidden

        return Hidden(self._x_BTV, [])

    def dense_weight(self) -> Any:
        """The identity [V, V]."""
        import torch

        return torch.eye(self._x_BTV.shape[-1], dtype=self._x_BTV.dtype)


def _places(segments_BT: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """The place of each token in its sequence."""
    places = np.zeros(segments_BT.shape, dtype=np.int64)
    for t in range(1, segments_BT.shape[1]):
        places[:, t] = np.where(segments_BT[:, t] == segments_BT[:, t - 1], places[:, t - 1] + 1, 0)
    places[segments_BT == 0] = 0
    return places


def worker(path: str) -> None:
    """In TRL's environment: read cases from ``path``, leave what they give beside it."""
    wanted = json.loads(Path(path).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        found = {
            f"{number}.{name}": value
            for number, case in enumerate(wanted)
            for name, value in (_sft if case["loss"] == "sft" else _dpo)(case, folder).items()
        }
    np.savez(Path(path).with_suffix(".npz"), allow_pickle=False, **found)  # type: ignore[arg-type]


def _tiny() -> tuple[Any, Any]:
    """A model and tokenizer with which their trainers can be built; only the vocabulary's size is used."""
    import tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{n}": n for n in range(3, WORDS)}
    table = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    table.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=table, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=WORDS, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        head_dim=8, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config), tokenizer


def _stub(logits_SLV: Any) -> Any:
    """Called as their model is, it answers with the log-probabilities that ``logits_SLV`` stand for, in float64."""
    import torch
    from trl.trainer.utils import FusedCausalLMOutput, selective_log_softmax

    def forward(labels: Any, fused_lm_head: bool, **_: Any) -> Any:
        assert fused_lm_head
        mask = labels[:, 1:] != -100
        log_probs = selective_log_softmax(logits_SLV[:, :-1], labels[:, 1:].clamp(min=0)).masked_fill(~mask, 0)
        zeros = torch.zeros_like(log_probs)
        return FusedCausalLMOutput(
            log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool(), label_mask=mask
        )

    return forward


def _arguments(folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder, "use_cpu": True, "bf16": False, "report_to": [], "gradient_checkpointing": False,
        "average_tokens_across_devices": True, "label_smoothing_factor": 0.0,
    }  # fmt: skip


def _sft(case: dict[str, Any], folder: str) -> Arrays:
    """The case by ``SFTTrainer.compute_loss``."""
    import torch
    from datasets import Dataset
    from transformers.modeling_outputs import BaseModelOutput
    from trl import SFTConfig, SFTTrainer

    given, (model, tokenizer) = inputs(case["seed"]), _tiny()
    settings = SFTConfig(
        **_arguments(folder), loss_type="nll", packing=False, padding_free=False, assistant_only_loss=False,
        completion_only_loss=False, max_length=None,
    )  # fmt: skip
    dataset = Dataset.from_dict({"input_ids": [[3, 4]], "labels": [[3, 4]]})
    trainer = SFTTrainer(model=model, args=settings, train_dataset=dataset, processing_class=tokenizer)
    dtype = torch.float32 if case["head"] else torch.float64
    logits = torch.from_numpy(given["logits"]).to(dtype).requires_grad_()
    ids, mask = torch.from_numpy(given["ids"]), torch.from_numpy(given["mask"])
    labels = ids.masked_fill(mask == 0, -100)
    attention = (torch.arange(LONGEST) < torch.from_numpy(given["lengths"])[:, None]).long()
    count, total = None if case["parts"] == 1 else (labels[:, 1:] != -100).sum(), 0.0
    for rows in torch.arange(SEQUENCES).chunk(case["parts"]):
        caller = _stub(logits[rows])
        if case["head"]:
            caller = model
            with torch.no_grad():
                model.lm_head.weight.copy_(torch.eye(WORDS))
            model.model.forward = lambda *_, **__: BaseModelOutput(last_hidden_state=logits)
        batch = {"input_ids": ids[rows], "labels": labels[rows], "attention_mask": attention[rows]}
        loss = trainer.compute_loss(caller, batch, num_items_in_batch=count)
        loss.backward()
        total += float(loss.detach())
    return {"loss": np.array(total), "gradient": logits.grad.double().numpy()}


def _dpo(case: dict[str, Any], folder: str) -> Arrays:
    """The case by ``DPOTrainer.compute_loss``."""
    import torch
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    given, (model, tokenizer) = inputs(case["seed"]), _tiny()
    settings = DPOConfig(
        **_arguments(folder), loss_type=[case["loss"]], loss_weights=[1.0], beta=case["beta"], label_smoothing=0.0,
        f_divergence_type="reverse_kl", use_weighting=False, ld_alpha=None, precompute_ref_log_probs=False,
        sync_ref_model=False, max_length=None,
    )  # fmt: skip
    dataset = Dataset.from_list([{"prompt": "w3 w4", "chosen": "w5", "rejected": "w6"}])
    trainer = DPOTrainer(
        model=model, ref_model=_tiny()[0], args=settings, train_dataset=dataset, processing_class=tokenizer
    )
    logits = torch.from_numpy(given["logits"]).requires_grad_()
    trainer.ref_model = _stub(torch.from_numpy(given["reference"]))
    attention = (torch.arange(LONGEST) < torch.from_numpy(given["lengths"])[:, None]).long()
    batch = {"input_ids": torch.from_numpy(given["ids"]), "attention_mask": attention}
    batch["completion_mask"] = torch.from_numpy(given["mask"])
    loss = trainer.compute_loss(_stub(logits), batch)
    loss.backward()
    metrics = trainer._metrics["train"]
    found = {"loss": np.array(float(loss.detach())), "gradient": logits.grad.numpy()}
    names = {"margin": "rewards/margins", "accuracy": "rewards/accuracies"}
    return found | {name: np.array(metrics[key][-1]) for name, key in names.items()}


def differences(mine: Arrays, theirs: Arrays) -> dict[str, float]:
    """By name: the largest difference, relative to the largest number of theirs.

    >>> differences({"loss": np.array(2.0)}, {"loss": np.array(2.5)})
    {'loss': 0.2}
    """
    return {
        name: float(np.abs(mine[name] - value).max() / max(float(np.abs(value).max()), 1e-300))
        for name, value in theirs.items()
    }


def measure(python: Path, quick: bool) -> list[dict[str, Any]]:
    """One row for each loss and quantity: the worst difference over all cases, and its bar (None: shown only)."""
    wanted = cases(quick)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cases.json"
        path.write_text(json.dumps(wanted), encoding="utf-8")
        command = [str(python), "-m", "bench.trl_losses", "--worker", str(path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"trl_losses: TRL's side failed\n{done.stderr[-3000:]}")
        found = dict(np.load(path.with_suffix(".npz"), allow_pickle=False))
    worst: dict[tuple[str, str, bool], float] = {}
    for number, case in enumerate(wanted):
        theirs = {name: found[f"{number}.{name}"] for name in ("loss", "gradient", "margin", "accuracy")
                  if f"{number}.{name}" in found}  # fmt: skip
        for name, figure in differences(ours(case), theirs).items():
            key = (case["loss"], name, case["head"])
            worst[key] = max(worst.get(key, 0.0), figure)
    return [
        {"loss": loss, "what": name, "head": head, "figure": figure, "bar": None if head else BAR,
         "met": head or figure <= BAR}
        for (loss, name, head), figure in worst.items()
    ]  # fmt: skip


def main() -> int:
    """Print each difference; 1 where one is above the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, one beta")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        worker(asked.worker)
        return 0
    rows = measure(make_trl(), asked.quick)
    missed = sum(not row["met"] for row in rows)
    if asked.json:
        print(json.dumps({"bar": BAR, "rows": rows, "missed": missed}))
        return 1 if missed else 0
    for row in rows:
        verdict = "shown" if row["bar"] is None else "met" if row["met"] else "MISSED"
        name = f"{row['loss']}{' by their head, float32' if row['head'] else ''}"
        print(f"{name:28} {row['what']:9} {row['figure']:9.1e} relative  bar {BAR:g}: {verdict}")
    held = [row["figure"] for row in rows if row["bar"] is not None]
    print(f"trl_losses: {'PASS' if not missed else 'MISS'}: {len(held) - missed} of {len(held)} bars met, "
          f"worst {max(held):.1e} relative (bar {BAR:g})")  # fmt: skip
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
