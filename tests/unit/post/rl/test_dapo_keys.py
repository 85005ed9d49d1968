"""What DAPO (arXiv 2503.14476) adds to GRPO is reached by keys: clip-higher, overlong shaping and filtering."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from sprat.config.rl import load_rl_config
from sprat.formats.load import save
from sprat.model import Transformer
from sprat.post.rl.ledger import LEDGER_FILE, RolloutLedger
from sprat.post.rl.questions import Questions
from sprat.post.rl.reinforce import reinforce
from sprat.post.rl.rollout import Rollout
from sprat.tokens import Tokenizer
from sprat.trust.run import Run
from sprat.trust.run_record import read_metrics

SMALL = (
    "steps=1", "prompts_per_step=8", "group_size=8", "max_tokens=6", "lr=1e-2", "gate=false", "held_out.share=0",
    "held_out.every=0", "trip_wires.action=off", "temperature=1.5",
)  # fmt: skip
Do = Callable[..., Run]


@pytest.fixture
def do(guesser: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> Do:
    save(guesser, tokenizer, tmp_path / "model")
    rows = [{"question": f"{number} train", "answer": "7"} for number in range(60)]
    (tmp_path / "ask.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(name: str, *keys: str) -> Run:
        config = load_rl_config(overrides=[*SMALL, *keys])
        return reinforce(tmp_path / "model", Questions(tasks=(str(tmp_path / "ask.jsonl"),)), tmp_path / name, config)

    return run


def answers(run: Run) -> list[Rollout]:
    return RolloutLedger.read(run.folder / LEDGER_FILE).rollouts(1)


def test_overlong_shaping_takes_from_the_reward_what_the_paper_says(do: Do) -> None:
    found = answers(do("shaped", "overlong_buffer=3"))
    assert len({len(one.token_ids) for one in found}) > 2
    for one in found:
        assert one.reward is not None
        length, limit, buffer = len(one.token_ids), 6, 3  # eq. 13: |y|, L_max, L_cache
        penalty = 0.0 if length <= limit - buffer else (limit - buffer - length) / buffer if length <= limit else -1.0
        assert one.reward == pytest.approx(one.score + penalty)


def test_overlong_filtering_leaves_out_what_was_cut(do: Do) -> None:
    found = answers(do("filtered", "mask_truncated=true"))
    assert {one.finish for one in found} == {"stop", "length"}
    assert all((one.reward is None) == (one.finish == "length") for one in found)


def test_a_rare_token_may_rise_further_with_a_higher_clip(do: Do) -> None:
    """Several minibatches: the later ones are off policy, and the clip decides what they may still do."""
    keys = ("minibatch=8", "epochs=3", "clip_low=0.9", "lr=1e-3")
    low, high = (read_metrics(do(f"clip-{value}", *keys, f"clip_high={value}").folder)[0] for value in (0.01, 50.0))
    assert low["clip_fraction"] > 0.05 and high["clip_fraction"] < low["clip_fraction"] / 2
