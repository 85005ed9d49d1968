"""Memory of a plan's ranks: what the planner says against what torch allocates.

Each pipeline rank's share is built from our own modules and stepped alone in this process: its layers, heads, widths
and experts as the plan cuts them, the actions of its schedule's table in their order with a real graph for each
micro-batch in flight, gradients added up, the optimizer with its ZeRO share stepped. What other ranks would send is
drawn: hidden states and gradients of the right shape; what a collective would leave in memory is left there (a gathered
sequence, the tokens that an expert receives).

Measured is the highest sum of the sizes of all tensor storages that are alive, the parameters included, over the second
step (the optimizer's state exists then): a ``TorchDispatchMode`` sees each storage as it is made, and a finalizer of
the storage sees it go. So it is what torch asked its allocator for, without the allocator's own rounding and reserve.

    python -m bench.plan_memory --quick
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from sprat.config import ModelConfig, ParallelPlan
from sprat.kernels import ops
from sprat.model.forward_context import ForwardContext
from sprat.model.layers import Embedding, Linear, RMSNorm
from sprat.model.moe import MoE, Routing, combine, dispatch
from sprat.model.mtp import MTP
from sprat.model.transformer import Block, Transformer
from sprat.plan.activations import KERNELS
from sprat.plan.families import from_config
from sprat.plan.memory import RankMemory, rank_memory
from sprat.plan.schedule import make_table

BAR = 0.05
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that are alive, and their highest sum; a storage may be emptied and filled again (FSDP)."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    @property
    def now(self) -> int:
        """Bytes that are alive."""
        alive = {key: storage for key, each in self.storages.items() if (storage := each()) is not None}
        for key in self.storages.keys() - alive.keys():
            del self.storages[key]
        return sum(storage.nbytes() for storage in alive.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` and count what it made; of a distributed tensor, the part that is here."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = getattr(leaf, "_local_tensor", leaf).untyped_storage()
                known = self.storages.get(storage._cdata)
                if known is None or known() is None:
                    self.storages[storage._cdata] = weakref.ref(storage)
        self.peak = max(self.peak, self.now)
        return result


class _ExpertParallelMoE(MoE):
    """A rank's share of an expert layer: the router over all experts, its own experts for as many pairs as it sends.

    What it receives is as large as what it sends (experts are taken to be busy alike), and it lies in memory anew.
    """

    def __init__(self, config: ModelConfig, own: int) -> None:
        super().__init__(config)
        self.experts = type(self.experts)(own, config.hidden_size, config.moe_intermediate_size)
        self.own = own

    def forward(
        self, x_BTD: Tensor, valid_BT: Tensor | None = None, given_BTK: Tensor | None = None
    ) -> tuple[Tensor, Routing]:
        """See ``MoE``."""
        x_ND = x_BTD.flatten(0, 1)
        routing = self.gate(x_ND)
        x_MD, token_M, weight_M = dispatch(x_ND, routing)
        received_MD = x_MD.clone()
        del x_MD
        rows_E = torch.full((self.own,), len(received_MD) // self.own)
        rows_E[: len(received_MD) % self.own] += 1
        out_ND = combine(self.experts(received_MD, rows_E), token_M, weight_M, x_ND)
        if self.shared_experts is not None:
            out_ND = out_ND + self.shared_experts(x_ND)
        return out_ND.view_as(x_BTD), routing


def _computed_twice(forward: Any) -> Any:
    """``forward``, keeping nothing but its input."""
    return lambda *inputs: checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)


class Share(nn.Module):
    """The stages of one pipeline rank, cut as the plan says."""

    def __init__(self, config: ModelConfig, plan: ParallelPlan, rank: int) -> None:
        super().__init__()
        self.plan, self.tensor = plan, plan.tensor
        cut = {
            "num_attention_heads": config.num_attention_heads // plan.tensor,
            "intermediate_size": config.intermediate_size // plan.tensor,
        }
        if not config.is_mla:
            cut |= {"num_key_value_heads": config.kv_heads // plan.tensor, "head_dim": config.attention_head_dim}
        self.config = config.replace(**cut)
        self.stages, self.blocks = plan.stages_of_rank(rank), nn.ModuleDict()
        counts = plan.split_layers(config.num_hidden_layers)
        for stage in self.stages:
            first = sum(counts[:stage])
            layers = range(first, first + counts[stage])
            self.blocks[str(stage)] = nn.ModuleList(self._block(layer) for layer in layers)
        vocab, last = config.vocab_size // plan.tensor, plan.stages - 1
        has_mtp = config.num_nextn_predict_layers > 0 and last in self.stages
        self.embed = Embedding(vocab, config.hidden_size) if 0 in self.stages or has_mtp else None
        self.mtp = MTP(self.config, self._block(config.num_hidden_layers)) if has_mtp else None
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps) if last in self.stages else None
        self.head = Linear(config.hidden_size, vocab) if last in self.stages else None
        if config.tie_word_embeddings and self.head is not None and self.embed is not None:
            self.head.weight = self.embed.weight

    def _block(self, layer: int) -> Block:
        block = Block(self.config, layer)
        if isinstance(block.mlp, MoE) and self.plan.expert > 1:
            block.mlp = _ExpertParallelMoE(self.config, self.config.n_routed_experts // self.plan.expert)
        name = "moe" if isinstance(block.mlp, MoE) else "mlp"
        if name in self.plan.recompute_modules:
            block.mlp.forward = _computed_twice(block.mlp.forward)  # type: ignore[method-assign]
        return block

    def parameters_of(self, stage: int) -> list[nn.Parameter]:
        """The parameters of one stage."""
        modules: list[nn.Module | None] = [self.blocks[str(stage)]]
        modules += [self.embed] if stage == 0 else []
        modules += [self.norm, self.head, self.mtp] if stage == self.plan.stages - 1 else []
        return [parameter for module in modules if module is not None for parameter in module.parameters()]

    def run_block(self, block: Block, x_BSD: Tensor, context: ForwardContext) -> Tensor:
        """One layer; with tensor parallelism the sequence is gathered before what is cut, and scattered behind."""
        if self.tensor == 1:
            return block(x_BSD, context)[0]
        normed = block.input_layernorm(x_BSD).repeat(1, self.tensor, 1)
        x_BSD = x_BSD + block.self_attn(normed, context).chunk(self.tensor, 1)[0]
        normed = block.post_attention_layernorm(x_BSD)
        if isinstance(block.mlp, MoE):
            return x_BSD + block.mlp(normed)[0]
        return x_BSD + block.mlp(normed.repeat(1, self.tensor, 1)).chunk(self.tensor, 1)[0]

    def forward_stage(self, stage: int, x: Tensor, tokens_BT: Tensor, context: ForwardContext) -> Tensor:
        """Hidden states of ``stage``, or the loss of the last."""
        if stage == 0 and self.embed is not None:
            x = self.embed(tokens_BT % len(self.embed.weight))
            x = x.chunk(self.tensor, 1)[0].contiguous() if self.tensor > 1 else x
        for block in self.blocks[str(stage)]:
            if self.plan.recompute == "full":
                x = checkpoint(self.run_block, block, x, context, use_reentrant=False, preserve_rng_state=False)
            else:
                x = self.run_block(block, x, context)
        if stage < self.plan.stages - 1 or self.norm is None or self.head is None:
            return x
        x = self.norm(x)
        loss = self._loss(x, tokens_BT)
        if self.mtp is None or self.embed is None:
            return loss
        embedded = self.embed(tokens_BT[:, 1:] % len(self.embed.weight))
        short = _context(self.config, self.plan.replace(sequence_length=embedded.shape[1]), x.dtype)
        return loss + 0.3 * self._loss(self.mtp(x[:, :-1], embedded, short)[0], tokens_BT[:, 1:])

    def _loss(self, x: Tensor, tokens_BT: Tensor) -> Tensor:
        """Cross-entropy of normed ``x``; with tensor parallelism, of the gathered sequence."""
        assert self.head is not None
        gathered = x.repeat(1, self.tensor, 1) if self.tensor > 1 else x
        targets_N = tokens_BT.flatten() % len(self.head.weight)
        return ops.linear_cross_entropy(gathered.flatten(0, 1), self.head.weight, targets_N)


class Step:
    """Steps of one rank: the actions of its table, gradients added up, the optimizer."""

    def __init__(self, config: ModelConfig, plan: ParallelPlan, rank: int) -> None:
        self.config, self.plan, self.rank = config, plan, rank
        self.dtype = _DTYPES[plan.precision]
        self.share = Share(config, plan, rank).to(self.dtype)
        for parameter in self.share.parameters():
            nn.init.normal_(parameter, std=0.02)
        self.main: dict[nn.Parameter, Tensor] = {}
        if plan.gradient_dtype == "fp32" and self.dtype != torch.float32:
            for parameter in self.share.parameters():
                self.main[parameter] = torch.zeros_like(parameter, dtype=torch.float32)
                parameter.register_post_accumulate_grad_hook(self._add_up)
        self.shards = [self._shard(name, p) for name, p in self.share.named_parameters()]
        self.optimizer = torch.optim.AdamW(self.shards, fused=True)
        self.context = _context(self.share.config, plan, self.dtype)

    def _add_up(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None
        self.main[parameter] += parameter.grad
        parameter.grad = None

    def _shard(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        """What of ``parameter`` this rank's optimizer steps: a float32 copy of its ZeRO share, or itself."""
        ranks = self.plan.expert_shard_ranks if ".experts." in name else self.plan.shard_ranks
        if self.plan.zero == 0 and self.dtype == torch.float32:
            return parameter
        if self.plan.zero == 0:
            ranks = 1
        numbers = -(-parameter.numel() // ranks)
        if self.dtype == torch.float32:  # the share is a part of the parameter
            return nn.Parameter(parameter.detach().view(-1)[:numbers])
        return nn.Parameter(parameter.detach().view(-1)[:numbers].float())

    def run(self) -> None:
        """One step."""
        plan, live = self.plan, dict[tuple[int, int], tuple[Tensor, Tensor]]()
        table = make_table(plan.schedule, plan.pipeline, plan.micro_batches, plan.virtual_stages)[self.rank]
        for action in table:
            key = (action.stage, action.micro_batch)
            if action.kind in ("F", "FB"):
                live[key] = self._forward(action.stage)
            if action.kind == "FB":
                self._backward(*live.pop((action.backward_stage, action.backward_micro_batch)))
            elif action.kind == "B":
                self._backward(*live.pop(key))
            elif action.kind == "I":
                received, out = live[key]
                if received.requires_grad:
                    torch.autograd.grad(out, received, _gradient(out), retain_graph=True)
            elif action.kind == "W":
                _, out = live.pop(key)
                torch.autograd.backward(out, _gradient(out), inputs=self.share.parameters_of(action.stage))
                del out
        for parameter, shard in zip(self.share.parameters(), self.shards, strict=True):
            gradient = self.main.get(parameter, parameter.grad)
            assert gradient is not None
            if shard is not parameter:
                shard.grad = gradient.view(-1)[: shard.numel()]
        self.optimizer.step()
        for parameter, shard in zip(self.share.parameters(), self.shards, strict=True):
            if shard.dtype != parameter.dtype:
                with torch.no_grad():
                    parameter.view(-1)[: shard.numel()].copy_(shard)
            if shard is not parameter:
                shard.grad = None
            if parameter in self.main:
                self.main[parameter].zero_()
            elif parameter.grad is not None:
                parameter.grad.zero_()

    def _forward(self, stage: int) -> tuple[Tensor, Tensor]:
        """(what came from the stage before, what goes on)."""
        plan = self.plan
        tokens_BT = torch.randint(self.config.vocab_size, (plan.micro_batch, plan.sequence_length // plan.context))
        shape = (plan.micro_batch, tokens_BT.shape[1] // plan.tensor, self.config.hidden_size)
        received = torch.empty(0) if stage == 0 else torch.randn(shape, dtype=self.dtype).requires_grad_()
        return received, self.share.forward_stage(stage, received, tokens_BT, self.context)

    def _backward(self, received: Tensor, out: Tensor) -> None:
        out.backward(_gradient(out))


def _gradient(out: Tensor) -> Tensor | None:
    """What comes back from the next stage; None for a loss."""
    return None if out.dim() == 0 else torch.randn_like(out)


def _context(config: ModelConfig, plan: ParallelPlan, dtype: torch.dtype) -> ForwardContext:
    """What all layers share in a pass, built once."""
    tokens_BT = torch.zeros(plan.micro_batch, plan.sequence_length // plan.context, dtype=torch.long)
    changes: dict[str, Any] = {"num_hidden_layers": 1, "vocab_size": 8, "num_nextn_predict_layers": 0}
    if config.layer_types:
        changes["layer_types"] = config.layer_types[:1]
    model = Transformer(config.replace(**changes), seed=None).to(dtype)
    return model.context(tokens_BT)


class _Whole(nn.Module):
    """A share of one stage as a module that is called, which FSDP wants."""

    def __init__(self, config: ModelConfig, plan: ParallelPlan) -> None:
        super().__init__()
        self.share = Share(config, plan, 0)

    def forward(self, tokens_BT: Tensor, context: ForwardContext) -> Tensor:
        """The loss of ``tokens_BT``."""
        return self.share.forward_stage(0, torch.empty(0), tokens_BT, context)


def measure_fsdp(config: ModelConfig, plan: ParallelPlan) -> int:
    """The most bytes alive in the second step under torch's own FSDP, on one rank of a world that is made up.

    Collectives of torch's fake process group allocate what they would fill and move nothing. Embedding and head are
    groups of their own, as torchtitan has it.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=plan.data_shard, store=FakeStore())
    try:
        mesh, live = init_device_mesh("cpu", (plan.data_shard,)), LiveBytes()
        with live:
            whole = _Whole(config, plan)
            for parameter in whole.parameters():
                nn.init.normal_(parameter, std=0.02)
            del parameter
            share = whole.share
            for group in (share.embed, *share.blocks["0"], [share.norm, share.head]):
                fully_shard(group, mesh=mesh, reshard_after_forward=not isinstance(group, list))  # type: ignore[arg-type]
            fully_shard(whole, mesh=mesh)
            optimizer = torch.optim.AdamW(whole.parameters(), foreach=False)
            context = _context(share.config, plan, torch.float32)
            for _ in range(2):
                live.peak = 0
                tokens_BT = torch.randint(config.vocab_size, (plan.micro_batch, plan.sequence_length))
                whole(tokens_BT, context).backward()
                optimizer.step()
                optimizer.zero_grad()
        return live.peak
    finally:
        torch.distributed.destroy_process_group()


def measure(config: ModelConfig, plan: ParallelPlan, rank: int) -> int:
    """The most bytes alive in the second step of ``rank``."""
    gc.collect()
    if plan.zero == 3:
        return measure_fsdp(config, plan)
    live = LiveBytes()
    with live:
        step = Step(config, plan, rank)
        step.run()
        live.peak = 0
        step.run()
    return live.peak


_MLA = {
    "architecture": "deepseek_v3", "vocab_size": 2048, "hidden_size": 192, "intermediate_size": 512,
    "num_hidden_layers": 6, "num_attention_heads": 6, "q_lora_rank": 96, "kv_lora_rank": 64, "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16, "v_head_dim": 32,
}  # fmt: skip
_GQA = {
    "architecture": "llama", "vocab_size": 2048, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6,
    "num_attention_heads": 6, "num_key_value_heads": 2,
}  # fmt: skip
# In bf16 torch's fused attention on CPUs wants queries as wide as values; else it keeps all scores, as no GPU does.
_WIDE = {"v_head_dim": 48}
_MOE = {
    **_MLA, "n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 4, "moe_intermediate_size": 128,
    "first_k_dense_replace": 1,
}  # fmt: skip
_FP32 = {"precision": "fp32", "zero": 0, "sequence_length": 512, "micro_batch": 2}
_BF16 = {**_FP32, "precision": "bf16"}
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("dense", _GQA, {**_FP32, "global_batch": 4}),
    ("dense, ZeRO-1 over 8", _GQA, {**_FP32, "data_shard": 8, "zero": 1, "global_batch": 32}),
    ("dense, pipeline 3", _GQA, {**_FP32, "pipeline": 3, "global_batch": 12}),
    ("dense, uneven pipeline", _GQA, {**_FP32, "pipeline": 3, "stage_layers": (1, 2, 3), "global_batch": 12}),
    ("dense, interleaved", _GQA, {
        **_FP32, "pipeline": 2, "schedule": "interleaved", "virtual_stages": 2, "global_batch": 8,
    }),
    ("dense, tensor 2", _GQA, {**_FP32, "tensor": 2, "global_batch": 4}),
    ("dense, context 2", _GQA, {**_FP32, "context": 2, "global_batch": 4, "sequence_length": 1024}),
    ("dense, full recomputation", _GQA, {**_FP32, "recompute": "full", "global_batch": 4, "micro_batch": 4}),
    ("dense bf16", _GQA, {**_BF16, "global_batch": 4}),
    ("dense bf16, pipeline 2, ZeRO-1 over 4", _GQA, {
        **_BF16, "pipeline": 2, "data_shard": 4, "zero": 1, "global_batch": 32,
    }),
    ("MLA", _MLA, {**_FP32, "global_batch": 4}),
    ("MLA, uneven pipeline", _MLA, {**_FP32, "pipeline": 3, "stage_layers": (2, 3, 1), "global_batch": 12}),
    ("MLA bf16, zero bubble V", {**_MLA, **_WIDE}, {
        **_BF16, "pipeline": 2, "schedule": "zbv", "virtual_stages": 2, "global_batch": 8,
    }),
    ("MoE", _MOE, {**_FP32, "global_batch": 4}),
    ("MoE, expert 4, ZeRO-1", _MOE, {**_FP32, "data_shard": 8, "expert": 4, "zero": 1, "global_batch": 32}),
    ("MoE, pipeline 2, expert 4", _MOE, {
        **_FP32, "pipeline": 2, "data_shard": 4, "expert": 4, "zero": 1, "global_batch": 32,
    }),
    ("MoE bf16, DualPipeV, expert 4", {**_MOE, **_WIDE}, {
        **_BF16, "pipeline": 2, "data_shard": 4, "expert": 4, "zero": 1, "schedule": "dualpipe_v", "virtual_stages": 2,
        "global_batch": 32,
    }),
    ("dense, FSDP over 8", _GQA, {**_FP32, "data_shard": 8, "zero": 3, "global_batch": 16}),
    ("MoE, FSDP over 8", _MOE, {**_FP32, "data_shard": 8, "zero": 3, "global_batch": 16}),
    ("MLA, tensor 2", _MLA, {**_FP32, "tensor": 2, "global_batch": 4}),
    ("MoE, tensor 2, uneven interleaved pipeline", _MOE, {
        **_FP32, "tensor": 2, "pipeline": 2, "schedule": "interleaved", "virtual_stages": 2,
        "stage_layers": (1, 2, 1, 2), "global_batch": 8,
    }),
    ("tied embeddings, pipeline 2", {**_GQA, "tie_word_embeddings": True}, {
        **_FP32, "pipeline": 2, "global_batch": 8,
    }),
    ("dense with norms of queries and keys", {**_GQA, "architecture": "qwen3"}, {**_FP32, "global_batch": 4}),
    ("dense with norms of queries and keys, bf16", {**_GQA, "architecture": "qwen3"}, {**_BF16, "global_batch": 4}),
    ("latent attention without latent queries", {**_MLA, "q_lora_rank": None}, {**_FP32, "global_batch": 4}),
    ("MTP", {**_MOE, "num_nextn_predict_layers": 1}, {**_FP32, "global_batch": 4}),
    ("MTP, pipeline 2, on the fuller last rank", {**_MOE, "num_nextn_predict_layers": 1}, {
        **_FP32, "pipeline": 2, "stage_layers": (1, 5), "global_batch": 8,
    }),
    ("dense, feed-forward recomputed", _GQA, {**_FP32, "recompute": ("mlp",), "global_batch": 4}),
    ("MoE, feed-forward recomputed, pipeline 2", _MOE, {
        **_FP32, "recompute": ("mlp", "moe"), "pipeline": 2, "global_batch": 8,
    }),
    ("MoE, full recomputation", _MOE, {**_FP32, "recompute": "full", "global_batch": 4}),
]  # fmt: skip


def predict(config: ModelConfig, plan: ParallelPlan, rank: int) -> RankMemory:
    """What the planner says of ``rank``, without a margin."""
    kernels = KERNELS["native" if plan.precision == "fp32" else "stock"]
    return rank_memory(from_config(config), plan, rank, kernels=kernels, margin=0.0)


def main(arguments: list[str] | None = None) -> int:
    """Run the cases, print a line for each, and say whether the bar is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the fullest rank of each plan only")
    parser.add_argument("--json", action="store_true", help="rows as JSON")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    parser.add_argument("--explain", action="store_true", help="the terms too")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows = []
    for name, shape, changes in CASES:
        if options.case not in name:
            continue
        config, plan = ModelConfig.model_validate(shape), ParallelPlan.model_validate(changes)
        predicted = [predict(config, plan, rank) for rank in range(plan.pipeline)]
        fullest = max(predicted, key=lambda each: each.bytes)
        for each in [fullest] if options.quick else predicted:
            start = time.perf_counter()
            measured = measure(config, plan, each.rank)
            row = {"case": name, "rank": each.rank, "of": plan.pipeline, "predicted": round(each.bytes)}
            row |= {"measured": measured, "error": each.bytes / measured - 1, "fullest": each is fullest}
            rows.append(row)
            if not options.json:
                seconds = time.perf_counter() - start
                text = f"{name:40} rank {each.rank}/{plan.pipeline} {each.bytes / 2**20:9.1f} MiB"
                print(f"{text} {measured / 2**20:9.1f} MiB {100 * row['error']:+6.1f} %  {seconds:.1f} s", flush=True)
                for term in each.terms if options.explain else ():
                    print(f"    {term.name:28} {term.bytes / 2**20:9.2f} MiB  {term.formula}")
    fullest_rows = [row for row in rows if row["fullest"]]
    worst = max(abs(row["error"]) for row in fullest_rows)
    passed = worst <= BAR
    if options.json:
        print(json.dumps({"bar": BAR, "worst": worst, "passed": passed, "rows": rows}, indent=1))
    verdict = "passed" if passed else "MISSED"
    summary = sys.stderr if options.json else sys.stdout
    print(f"bar {100 * BAR:g} %: worst of {len(fullest_rows)} plans {100 * worst:.1f} %: {verdict}", file=summary)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
