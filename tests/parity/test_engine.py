"""Train logits == engine logits, and the same experts chosen: one model for training, rollouts and serving."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sprat.config.sizes import size
from sprat.engine import Engine, Sampling
from sprat.model import Gate, Transformer
from sprat.tokens import Tokenizer

SHAPES: dict[str, dict[str, Any]] = {
    "v3": {"first_k_dense_replace": 1, "num_hidden_layers": 3},
    "v3-groups-q-lora": {"q_lora_rank": 24, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    "v2-softmax": {"architecture": "deepseek_v2", "scoring_func": "softmax", "topk_method": "greedy"},
    "qwen3": {"architecture": "qwen3", "n_routed_experts": 0, "num_key_value_heads": 2, "head_dim": 16},
    "yarn": {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4,
            "original_max_position_embeddings": 64,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
}
LOGITS_WITHIN = 1e-5


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A tiny one of our own."""
    return Tokenizer.train(["12 + 13 = 25 and 7 + 8 = 15 are sums of two terms.\n" * 5], 500)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_engine_computes_the_logits_and_routes_of_training(shape: str, tokenizer: Tokenizer) -> None:
    config = size("pico", vocab_size=tokenizer.vocab_size, max_position_embeddings=256, **SHAPES[shape])
    model = Transformer.create(config, 7)
    for gate in [module for module in model.modules() if isinstance(module, Gate)]:
        if gate.has_bias:
            torch.nn.init.normal_(gate.e_score_correction_bias, std=0.05, generator=torch.Generator().manual_seed(1))
    engine = Engine(model, tokenizer, max_batch=3, prefill_tokens=60)
    seen = _record(engine)
    prompts = [[5 + i, *range(10, 13 + 9 * i)] for i in range(5)]
    how = [Sampling(max_tokens=4 + 5 * i, seed=i, temperature=0.7) for i in range(5)]
    outputs = engine.generate(prompts, how)
    for output in outputs:
        ids, start = output.prompt_ids + output.token_ids[:-1], len(output.prompt_ids)
        with torch.no_grad():
            hidden = model.hidden(torch.tensor([ids]))
            logits_TV = model.head(hidden.x_BTD)[0, start - 1 :]
        engine_logits = torch.stack([seen[tuple(ids[: start + t])][0] for t in range(len(output.token_ids))])
        assert (engine_logits - logits_TV).abs().max() <= LOGITS_WITHIN
        for layer, routing in enumerate(hidden.routing):
            chosen = routing.index_NK.sort(-1).values[start - 1 :]
            engine_chosen = torch.stack([seen[tuple(ids[: start + t])][1][layer] for t in range(len(output.token_ids))])
            assert torch.equal(engine_chosen, chosen)


def _record(engine: Engine) -> dict[tuple[int, ...], tuple[Tensor, list[Tensor]]]:
    """Notes, for each prefix that the engine samples after, its logits [V] and the experts of its last token."""
    seen: dict[tuple[int, ...], tuple[Tensor, list[Tensor]]] = {}
    routes: list[list[Tensor]] = []
    model, run = engine.model, engine.runner.run
    hidden = model.hidden

    def hidden_noted(tokens_BT: Tensor, **arguments: Any) -> Any:
        out = hidden(tokens_BT, **arguments)
        valid = arguments.get("valid_BT")
        last_B = valid.sum(1) - 1 if valid is not None else torch.full((len(tokens_BT),), tokens_BT.shape[1] - 1)
        for row, last in enumerate(last_B.tolist()):
            routes.append([r.index_NK.view(*tokens_BT.shape, -1)[row, last].sort().values for r in out.routing])
        return out

    def run_noted(plan: Any) -> Any:
        routes.clear()
        prefixes = [tuple(s.prompt + s.token_ids) for s in engine.scheduler.running]
        logits: list[Tensor] = []
        hook = model.head.register_forward_hook(lambda module, args, out: logits.append(out))
        samples = run(plan)
        hook.remove()
        if samples is not None:
            seen.update(zip(prefixes, zip(logits[0], list(routes), strict=True), strict=True))
        return samples

    model.hidden = hidden_noted  # type: ignore[method-assign]
    engine.runner.run = run_noted  # type: ignore[method-assign]
    return seen
