"""A teacher's distributions on packed rows, computed once and kept as a run for every student that learns them.

The teacher runs over every row once, instead of once in each pass of each training. Of each place that carries loss are
kept the k likeliest words, their log-probabilities, and the log of what all others have together: at k = 64 in float16
388 bytes, where all of 50,000 words in float32 would be 200,000. The files are shards of ``SHARD_ROWS`` rows:

    shard-00000.safetensors     ids [n, k] int32, log_probs [n, k], tail [n] float32, places [rows + 1] int64

``places`` says where in it each row's begin. A shard is there whole or not at all, so that a run that is interrupted
goes on with the next one; the run is finished, and can be read, when all are there. What is read is divided by its sum,
so that rounding makes no distribution of more or less than one.

The two tokenizers must be one: the same text for each id. For different ones there is ``span_likelihood``.
"""

# R rows, N places with loss, K words kept, B buckets, V words

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sprat.config import LoopConfig
from sprat.config.teach import LogitsCacheConfig, LogitsConfig
from sprat.data.loader import IGNORE_INDEX, Batch, gather_rows
from sprat.data.pack import PackedDataset
from sprat.errors import ConfigError, MachineError
from sprat.files import atomic
from sprat.formats.load import load
from sprat.model import Transformer, flops_per_token
from sprat.post.distill_losses import bucket_log_probs, head_divergence
from sprat.post.dpo import row_keys
from sprat.tokens import Tokenizer
from sprat.tokens.tokenizer import first_difference
from sprat.train import losses
from sprat.trust.ledger import LEDGER_NAME
from sprat.trust.run import Run, open_run

SHARD_ROWS = 64
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_LOWEST = -80.0  # a log-probability below which nothing is told apart

OnSize = Callable[[int], None]


def cache_bytes(rows: PackedDataset, config: LogitsCacheConfig, vocab_size: int) -> int:
    """How many bytes the distributions of ``rows`` take, about."""
    top_k = min(config.top_k, vocab_size)
    return rows.num_targets * (top_k * (4 + _DTYPES[config.dtype].itemsize) + 4) + 8 * rows.num_rows


def check_same_tokenizer(teacher: Tokenizer, student: Tokenizer) -> None:
    """That every id stands for the same bytes, and is a control token or not, in both.

    Raises:
        ConfigError: one does not.
    """
    token_id = first_difference(teacher, student)
    if token_id is None:
        return
    todo = "use --spans in place of --logits, or take a student with the teacher's tokenizer"
    if teacher.vocab_size != student.vocab_size:
        what = f"the teacher's tokenizer has {teacher.vocab_size} ids, the student's {student.vocab_size}"
        raise ConfigError(what, where="logits", todo=todo)
    what = f"id {token_id} is {teacher.decode([token_id])!r} to the teacher and {student.decode([token_id])!r}"
    raise ConfigError(f"{what} to the student", where="logits", todo=todo)


def cache_logits(
    teacher: Path,
    tokenizer: Tokenizer,
    rows: PackedDataset,
    folder: str | Path,
    config: LogitsCacheConfig,
    *,
    on_size: OnSize = lambda size: None,
) -> Run:
    """The finished run of the distributions of the model at ``teacher``, also where it was finished before.

    Args:
        tokenizer: the student's.
        rows: what the student learns.
        folder: of the run; its ledger lies in the folder above it.
        on_size: is told how many bytes it will take, before it begins.

    Raises:
        ConfigError: the two tokenizers differ. MachineError: there is no room on the disk.
        SpratError: the teacher cannot be loaded; nothing was touched.
    """
    folder, loaded = Path(folder), list[Transformer]()

    def prepare(resuming: bool) -> None:
        model, teacher_tokenizer = load(teacher)
        check_same_tokenizer(teacher_tokenizer, tokenizer)
        size, parent = cache_bytes(rows, config, tokenizer.vocab_size), folder.absolute().parent
        while not parent.exists():
            parent = parent.parent
        if not resuming and size > (free := shutil.disk_usage(parent).free):
            todo = "set logits.top_k lower, or give another folder"
            raise MachineError(
                f"it takes {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free", where=str(folder), todo=todo
            )
        on_size(size)
        loaded.append(model)

    run = open_run(
        folder,
        stage="logits",
        recipe=config,
        inputs={"teacher": teacher, "rows": rows.digest},
        seed=0,
        ledger=folder.parent / LEDGER_NAME,
        prepare=prepare,
    )
    if not run.done:
        _fill(run, loaded[0], tokenizer.vocab_size, rows, config)
    return run


def _fill(run: Run, teacher: Transformer, vocab_size: int, rows: PackedDataset, config: LogitsCacheConfig) -> None:
    """Write the shards that are missing, and finish."""
    from safetensors.torch import save_file

    teacher.eval()
    starts = range(0, rows.num_rows, SHARD_ROWS)
    run.start_progress(len(starts), len(list(run.checkpoints.glob("shard-*.safetensors"))))
    for number, start in enumerate(starts):
        path = run.checkpoints / f"shard-{number:05d}.safetensors"
        if not path.is_file():
            index = range(start, min(start + SHARD_ROWS, rows.num_rows))
            parts = [_distributions(teacher, gather_rows(rows, [row]), vocab_size, config) for row in index]
            tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
            lengths = [len(part["tail"]) for part in parts]
            tensors["places"] = torch.tensor([0, *np.cumsum(lengths).tolist()])
            with atomic.replace_file(path) as temporary:
                save_file(tensors, temporary)
            run.log(number + 1, places=len(tensors["tail"]))
    for path in sorted(run.checkpoints.glob("shard-*.safetensors")):
        os.replace(path, run.artifact / path.name)
    positions = int(np.count_nonzero(rows.segments[:, :-1]))
    run.add_facts(rows=rows.num_rows, targets=rows.num_targets, top_k=min(config.top_k, vocab_size))
    run.finish(tokens=positions, flops=positions * flops_per_token(teacher.config, rows.seq_len))


def _distributions(teacher: Transformer, batch: Batch, vocab_size: int, config: LogitsCacheConfig) -> dict[str, Tensor]:
    """What is kept of the places of ``batch`` that carry loss; ids beyond the tokenizer's are nobody's words."""
    selected_BT, head_VD = batch.targets_BT != IGNORE_INDEX, teacher.head.dense_weight()[:vocab_size]
    parts: dict[str, list[Tensor]] = {"ids": [], "log_probs": [], "tail": []}
    with torch.no_grad():
        x_BTD = teacher.hidden(batch.tokens_BT, segments_BT=losses.attention_segments(batch.segments_BT)).x_BTD
        x_ND, head_VD = x_BTD[selected_BT].float(), head_VD.float()
        for rows in losses.head_chunks(x_ND, head_VD):
            logits_CV = (x_ND[rows] @ head_VD.T).div_(config.temperature)
            ids_CK = logits_CV.topk(min(config.top_k, vocab_size)).indices
            buckets_CB = bucket_log_probs(logits_CV, ids_CK).clamp_min(_LOWEST)
            width = ids_CK.shape[1]
            tail_C = (
                buckets_CB[:, width] if buckets_CB.shape[1] > width else buckets_CB.new_full((len(ids_CK),), _LOWEST)
            )
            parts["ids"].append(ids_CK.to(torch.int32))
            parts["log_probs"].append(buckets_CB[:, :width].to(_DTYPES[config.dtype]))
            parts["tail"].append(tail_C.contiguous())
    if not len(x_ND):
        return {"ids": torch.zeros(0, min(config.top_k, vocab_size), dtype=torch.int32),
                "log_probs": torch.zeros(0, min(config.top_k, vocab_size), dtype=_DTYPES[config.dtype]),
                "tail": torch.zeros(0)}  # fmt: skip
    return {name: torch.cat(pieces).contiguous() for name, pieces in parts.items()}


class TeacherLogits:
    """The distributions of a finished run, found by the rows of a batch.

    Args:
        folder: the run's artefact.
        rows: those that it was made for.
    """

    def __init__(self, folder: Path, rows: PackedDataset) -> None:
        from safetensors import safe_open

        self._shards: list[Any] = [
            safe_open(path, framework="pt") for path in sorted(folder.glob("shard-*.safetensors"))
        ]
        self._table = dict[bytes, tuple[int, int, int]]()  # shard, and its places from and to
        for number, shard in enumerate(self._shards):
            positions = shard.get_tensor("places").tolist()
            start = number * SHARD_ROWS
            keys = row_keys(gather_rows(rows, range(start, start + len(positions) - 1)))
            self._table |= {key: (number, *positions[row : row + 2]) for row, key in enumerate(keys)}

    def __call__(self, batch: Batch, student_vocab: int) -> tuple[Tensor, Tensor]:
        """ids [N, K] int64 and log-probabilities [N, B] float32 of the places of ``batch`` that carry loss, in order.

        Args:
            student_vocab: V; where all of its words are kept there is no tail.
        """
        ids, buckets = list[Tensor](), list[Tensor]()
        for key in row_keys(batch):
            number, start, stop = self._table[key]
            part = {name: self._shards[number].get_slice(name)[start:stop] for name in ("ids", "log_probs", "tail")}
            kept_NK, tail_N1 = part["log_probs"].float(), part["tail"][:, None]
            buckets.append(kept_NK if kept_NK.shape[1] == student_vocab else torch.cat([kept_NK, tail_N1], 1))
            ids.append(part["ids"].long())
        device = batch.tokens_BT.device
        return torch.cat(ids).to(device), torch.cat(buckets).log_softmax(1).to(device)


def logits_loss(teacher: TeacherLogits, config: LogitsConfig) -> losses.LossFn:
    """The loss of ``config`` as a function for ``train.loop.train``; see ``distill_losses.head_divergence``.

    MTP modules and the router's balance learn as in pre-training. Metrics: ``loss`` is the cross-entropy, and
    ``divergence`` what is pulled down beside it, both in nats a token.
    """

    def loss(model: Transformer, batch: Batch, settings: LoopConfig, whole: Batch | None = None) -> losses.Loss:
        whole = whole or batch
        hidden = model.hidden(batch.tokens_BT, segments_BT=losses.attention_segments(batch.segments_BT))
        head_VD, selected_BT = model.head.dense_weight(), batch.targets_BT != IGNORE_INDEX
        ids_NK, teacher_NB = teacher(batch, len(head_VD))
        targets_N, share = batch.targets_BT[selected_BT], 1 / max(losses.num_targets(whole.targets_BT), 1)
        sums = head_divergence(hidden.x_BTD[selected_BT], head_VD, targets_N, ids_NK, teacher_NB, config)
        total, divergence, ce = (each * share for each in sums)
        metrics = {"loss": ce.item(), "divergence": divergence.item()}
        return losses.with_auxiliary(total, metrics, model, hidden, batch, whole, settings)

    return loss
