"""How far the trainer is from the sampler, and what it costs to keep them together.

A model samples with each precision, and the trainer computes the same answers again: the gap of log-probabilities in
nats (mean, 99th percentile, largest), the share of the sampler's experts that were taken again and that would have
flipped. Bar: float32 at most 1e-4 nats, all experts taken again. What it costs is CPU time of one thread: answers whose
experts are asked over those that are not, also where prompts share their beginning, which is then computed anew; and
answers whose weights change every so many tokens.

    python -m bench.rl_gap [MODEL] [--json]     without MODEL: a mixture of experts with random weights
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import torch

from sprat.config.rl import RLRunConfig
from sprat.config.sizes import size
from sprat.engine import Engine, Sampling
from sprat.formats.load import load_dense, locate
from sprat.model import Transformer
from sprat.post.rl.batch import forward_responses
from sprat.post.rl.logprob_gap import LogprobGap
from sprat.post.rl.rewards import Response
from sprat.post.rl.rollout import Rollout
from sprat.post.rl.rollout_engine import RolloutEngine
from sprat.tokens import Tokenizer
from sprat.train.losses import token_logprob

BAR, ANSWERS, TOKENS = 1e-4, 16, 64
EVERY = (32, 8)  # tokens between two changes of the weights
_SHAPE: dict[str, Any] = {
    "hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8, "n_routed_experts": 32,
    "num_experts_per_tok": 4, "moe_intermediate_size": 128, "intermediate_size": 512, "max_position_embeddings": 1024,
}  # fmt: skip


def mixture() -> tuple[Transformer, Tokenizer]:
    """A model with random weights, whose answers are about as sure as a trained one's."""
    tokenizer = Tokenizer.train(["7 train test 1 2 3\n"] * 4, 300, numbers=10)
    model = Transformer.create(size("pico", vocab_size=tokenizer.vocab_size, **_SHAPE), 0)
    with torch.no_grad():
        model.head.weight.mul_(4)
    return model, tokenizer


def sample(engine: Engine, prompts: Sequence[Sequence[int]], *, routes: bool = True) -> tuple[float, list[Rollout]]:
    """CPU seconds, and an answer to each prompt."""
    how = Sampling(max_tokens=TOKENS, logprobs=True, routes=routes, ignore_eos=True, seed=1)
    start = time.process_time()
    outputs = engine.generate(prompts, how)
    seconds, rollouts = time.process_time() - start, list[Rollout]()
    for one in outputs:
        experts = None if one.routes is None else torch.from_numpy(one.routes)
        parts = one.prompt_ids, one.token_ids, one.logprobs or []
        rollouts.append(
            Rollout("gap", *parts, Response("", "", True), 0.0, 0.0, 0, versions=[0] * TOKENS, routes=experts)
        )
    return seconds, rollouts


def gap(model: Transformer, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """What the log of a run says of them."""
    found = LogprobGap(step=1)
    with torch.no_grad():
        for start in range(0, len(rollouts), 4):
            part = rollouts[start : start + 4]
            tokens = forward_responses(model, part, torch.zeros(len(part)))
            logprob_N, _ = token_logprob(tokens.x_ND, model.head.dense_weight(), tokens.targets_N, 1.0)
            found.compare(logprob_N, tokens, part)
            found.trained += tokens.routes
    return found.metrics()


def fastest(model: Transformer, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], *, routes: bool) -> float:
    """CPU seconds, the least of three."""
    return min(sample(Engine(model, tokenizer, max_batch=ANSWERS), prompts, routes=routes)[0] for _ in range(3))


def in_flight(model: Transformer, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], every: int) -> float:
    """CPU seconds where the weights change after every so many steps of the engine."""
    engine, steps = Engine(model, tokenizer, max_batch=ANSWERS), 0

    def before_step() -> None:
        nonlocal steps
        steps += 1
        if steps % every == 0:
            engine.update_weights(lambda: None, steps)

    engine.before_step = before_step
    return sample(engine, prompts)[0]


def measure(model: Transformer, tokenizer: Tokenizer) -> dict[str, Any]:
    """All of it."""
    generator, vocab = torch.Generator().manual_seed(0), tokenizer.vocab_size
    prompts = torch.randint(3, vocab, (ANSWERS, 200), generator=generator).tolist()
    found: dict[str, Any] = {}
    for precision in ("float32", "bfloat16", "int4"):
        config = RLRunConfig.model_validate({"rollout": {"precision": precision}, "importance_cap": 2.0})
        start = time.process_time()
        engine = RolloutEngine(model, tokenizer, config, ANSWERS).engine
        made = time.process_time() - start
        seconds, rollouts = sample(engine, prompts)
        found[precision] = {**gap(model, rollouts), "copy_seconds": made, "sample_seconds": seconds}
    shared = [prompts[0][:150] + prompt[150:] for prompt in prompts]
    plain, routed = (fastest(model, tokenizer, prompts, routes=routes) for routes in (False, True))
    plain_shared, routed_shared = (fastest(model, tokenizer, shared, routes=routes) for routes in (False, True))
    found["routes_cost"] = {"distinct": routed / plain, "150 of 200 shared": routed_shared / plain_shared}
    found["in_flight_cost"] = {every: in_flight(model, tokenizer, prompts, every) / routed for every in EVERY}
    return found


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--json", action="store_true")
    words = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_dense(locate(words.model)) if words.model else mixture()
    found = measure(model, tokenizer)
    if words.json:
        print(json.dumps(found))
    else:
        for name, value in found.items():
            print(f"{name:24} {json.dumps(value)}")
    exact = found["float32"]
    holds = exact["logprob_gap_max"] <= BAR and exact.get("routes_replayed", 1.0) == 1.0
    print(f"float32 within {BAR:g} nats, all experts taken again: {'yes' if holds else 'NO'}")
    raise SystemExit(not holds)


if __name__ == "__main__":
    main()
