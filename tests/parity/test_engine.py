"""Train logits == engine logits, and the same experts chosen: one model for training, rollouts and serving."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from sprat.config.sizes import size
from sprat.engine import Engine, Sampling
from sprat.engine.backend import BLOCK_SIZE, Batch
from sprat.engine.backends.native import NativeBackend
from sprat.engine.backends.torch import TorchBackend, _groups
from sprat.kernels import native, unavailable_reason
from sprat.model import Gate, Transformer
from sprat.model.moe import Routing
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
LOGITS_WITHIN = 1e-5  # float32 sums in another order; logits here lie between -1 and 1
BACKENDS = {
    "torch": TorchBackend,
    "native": pytest.param(NativeBackend, marks=pytest.mark.skipif(native() is None, reason=unavailable_reason())),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A tiny one of our own."""
    return Tokenizer.train(["12 + 13 = 25 and 7 + 8 = 15 are sums of two terms.\n" * 5], 500)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_engine_computes_the_logits_and_routes_of_training(shape: str, backend: Any, tokenizer: Tokenizer) -> None:
    """Experts one by one where the back end is torch; natively by what a single other one would do to the logits."""
    config = size("pico", vocab_size=tokenizer.vocab_size, max_position_embeddings=256, **SHAPES[shape])
    model = Transformer.create(config, 7)
    gates = [module for module in model.modules() if isinstance(module, Gate)]
    for gate in gates:
        if gate.has_bias:
            torch.nn.init.normal_(gate.e_score_correction_bias, std=0.05, generator=torch.Generator().manual_seed(1))
    engine = Engine(model, tokenizer, max_batch=3, step_tokens=60, backend=backend(model))
    seen = _record(engine)
    prompts = [[5 + i, *range(10, 13 + 32 * i)] for i in range(5)]
    how = [Sampling(max_tokens=4 + 5 * i, seed=i, temperature=0.7) for i in range(5)]
    outputs = engine.generate(prompts, how)
    for output in outputs:
        ids, start = output.prompt_ids + output.token_ids[:-1], len(output.prompt_ids)
        with torch.no_grad():
            hidden = model.hidden(torch.tensor([ids]))
            logits_TV = model.head(hidden.x_BTD)[0, start - 1 :]
        engine_logits = torch.stack([seen[tuple(ids[: start + t])][0] for t in range(len(output.token_ids))])
        assert (engine_logits - logits_TV).abs().max() <= LOGITS_WITHIN
        if backend is TorchBackend:
            for layer, routing in enumerate(hidden.routing):
                chosen = routing.index_NK.sort(-1).values[start - 1 :]
                noted = [seen[tuple(ids[: start + t])][1][layer] for t in range(len(output.token_ids))]
                assert torch.equal(torch.stack(noted), chosen)
            continue
        for gate in gates:
            with torch.no_grad(), _another_expert(gate):
                other_TV = model(torch.tensor([ids]))[0, start - 1 :]
            assert (other_TV - logits_TV).abs().amax(-1).min() > 10 * LOGITS_WITHIN, "the logits would not tell"


@contextmanager
def _another_expert(gate: Gate) -> Iterator[None]:
    """The least of the chosen experts gives way to the next that was not chosen, its weight stays."""

    def changed(module: Gate, given: Any, routing: Routing) -> Routing:
        index_NK = routing.index_NK.clone()
        taken_NE = torch.zeros_like(routing.scores_NE, dtype=torch.bool).scatter_(1, index_NK, True)
        index_NK[:, -1] = taken_NE.int().argmin(1)
        load_E = index_NK.flatten().bincount(minlength=len(routing.load_E))
        return Routing(routing.scores_NE, index_NK, routing.weight_NK, load_E, load_E)

    hook = gate.register_forward_hook(changed)
    try:
        yield
    finally:
        hook.remove()


def _record(engine: Engine) -> dict[tuple[int, ...], tuple[Tensor, list[Tensor]]]:
    """Notes, for each prefix whose logits the engine asks for, those [V] and the experts of its last token."""
    seen: dict[tuple[int, ...], tuple[Tensor, list[Tensor]]] = {}
    text: dict[tuple[int, int], int] = {}
    routes: list[list[Tensor]] = []
    model, run, hidden = engine.model, engine.backend.run, engine.model.hidden

    def hidden_noted(tokens_BT: Tensor, **arguments: Any) -> Any:
        out = hidden(tokens_BT, **arguments)
        routes.append([one.index_NK for one in out.routing])
        return out

    def run_noted(batch: Batch) -> Tensor:
        routes.clear()
        logits_RV = run(batch)
        experts: dict[int, list[Tensor]] = dict.fromkeys(range(len(batch.tokens_T)), [])
        for group, routing in (
            zip(_groups(batch), routes, strict=True) if routes else ()
        ):  # none where torch did not run
            for place, index in enumerate(group.tokens_GN.ravel().tolist()):
                experts[index] = [index_NK[place].sort().values for index_NK in routing]
        for row in range(len(batch.starts_S) - 1):
            for index in range(batch.starts_S[row], batch.starts_S[row + 1]):
                at = int(batch.positions_T[index])
                text[int(batch.block_tables_SW[row, at // BLOCK_SIZE]), at % BLOCK_SIZE] = int(batch.tokens_T[index])
                if index in batch.logits_index_R:
                    blocks = batch.block_tables_SW[row].tolist()
                    prefix = tuple(text[blocks[place // BLOCK_SIZE], place % BLOCK_SIZE] for place in range(at + 1))
                    number = batch.logits_index_R.tolist().index(index)
                    seen[prefix] = logits_RV[number].clone(), experts[index]
        return logits_RV

    model.hidden = hidden_noted  # type: ignore[method-assign]
    engine.backend.run = run_noted  # type: ignore[method-assign]
    return seen
