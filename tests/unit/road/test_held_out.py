"""What is held out stays held out: every row that a weight learns from, and every question that is asked for a score.

The stages are run as the road runs them, and watched where nothing can pass by: at the model, whose rows are turned
back into text, and at the engine. A problem is known by the numbers of its question, not by what our code calls it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from sprat.engine import Engine
from sprat.model import Transformer
from sprat.road import controls, data, measure, squeeze, training
from sprat.road.places import Road
from sprat.road.recipe import named
from sprat.tokens import Message

SMALL = (
    'data.tasks=[{name="sums",title="sums",settings={min_terms=2,max_terms=3,max_value=9}},'
    '{name="reasoning-gym/chain_sum",title="chain_sum",settings={min_terms=2,max_terms=3,min_digits=1,max_digits=1}}]',
    'data.unseen=[{name="sums",title="longer",settings={min_terms=4,max_terms=4,max_value=9}}]',
    "data.demonstrations=1500", "data.vocab_size=400", "data.test_problems=20", "data.dev_problems=20",
    "data.text_bytes=20000", "pretrain.train.steps=24", "pretrain.text_share=0.125", "distill.task_share=0.25",
    'pretrain.model={size="pico",changes={hidden_size=16,kv_lora_rank=16,moe_intermediate_size=16,intermediate_size=32,'
    "num_hidden_layers=1,first_k_dense_replace=0}}",
    "rl.rl.steps=2", "rl.rl.format_weight=1.0", "rl.rl.max_tokens=8", "controls.rft.max_tokens=8", "eval.max_tokens=4",
    "eval.side_problems=5",
)  # fmt: skip
Form = tuple[int, ...]
WORK: dict[str, Callable[[Road], None]] = {
    "pretrain": training.pretrain,
    "sft": training.fine_tune,
    "rl": lambda road: training.reinforce(road, 0),
    "rft": controls.rejection_sampling,
    "more": controls.more_pretraining,
    "scratch": controls.scratch,
    "distill": training.student,
    "quantize": squeeze.squeeze,
}


def form(question: str) -> Form:
    """The signed terms of a sum, sorted."""
    terms = question.rpartition(":")[2]
    return tuple(sorted(int(sign + digits) for sign, digits in re.findall(r"([+-]?) ?(\d+)", terms)))


class Watch:
    """Problems that ``stage`` learned from, or drew answers to for that, and those that it was asked for a score."""

    def __init__(self) -> None:
        self.stage, self.scoring = "", False
        self.learned: dict[str, set[Form]] = {}
        self.asked: dict[str, set[Form]] = {}


@pytest.fixture(scope="module", params=["test", "dev"])
def walked(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Road, Watch]]:
    """A road that was walked under watch; whatever a teacher answers counts as right, so that it is taught."""
    folder, watch = tmp_path_factory.mktemp("held"), Watch()
    (folder / "text").mkdir()
    for name in "abcd":
        (folder / "text" / f"{name}.txt").write_text("a small fish in a wide sea. " * 300)
    road = Road(folder / "road", named("tiny", (*SMALL, f"eval.split={request.param}")))
    hidden, generate, scores = Transformer.hidden, Engine.generate, measure.scores
    with pytest.MonkeyPatch.context() as patch:
        data.data(road, folder / "text")
        tokenizer = road.artefacts.tokenizer()

        def learning(self: Transformer, tokens_BT: torch.Tensor, **more: Any) -> Any:
            if torch.is_grad_enabled():
                text = " ".join(tokenizer.decode(row) for row in tokens_BT.tolist())
                found = re.findall(r"<\|user\|>(.*?)<\|assistant\|>", text, re.S)
                watch.learned.setdefault(watch.stage, set()).update(map(form, found))
            return hidden(self, tokens_BT, **more)

        def asking(self: Engine, prompts: Any, *rest: Any, **more: Any) -> Any:
            found = {form(prompt[-1].content) for prompt in prompts if isinstance(prompt[-1], Message)}
            (watch.asked if watch.scoring else watch.learned).setdefault(watch.stage, set()).update(found)
            return generate(self, prompts, *rest, **more)

        def scoring(*rest: Any, **more: Any) -> Any:
            watch.scoring = True
            try:
                return scores(*rest, **more)
            finally:
                watch.scoring = False

        patch.setattr(Transformer, "hidden", learning)
        patch.setattr(Engine, "generate", asking)
        patch.setattr(measure, "scores", scoring)
        patch.setattr("sprat.post.distill.is_right", lambda score: True)
        for stage, work in WORK.items():
            watch.stage = stage
            work(road)
        yield road, watch


def kept(road: Road, split: str) -> set[Form]:
    """The held-out problems of ``split``, read from the files that the data stage left."""
    files = sorted((road.path("data") / "artefact" / "problems" / split).glob("*.jsonl"))
    assert len(files) == 3
    return {form(json.loads(line)["question"]) for file in files for line in file.read_text().splitlines()}


def test_no_stage_learns_from_a_problem_of_dev_or_test(walked: tuple[Road, Watch]) -> None:
    road, watch = walked
    held = kept(road, "test") | kept(road, "dev")
    assert len(held) > 60
    for stage in ("pretrain", "sft", "rft", "more", "scratch", "distill", "rl"):
        assert watch.learned[stage] and not watch.learned[stage] & held, stage
    assert len(watch.learned["pretrain"]) > 100


def test_no_score_comes_from_a_problem_of_another_split(walked: tuple[Road, Watch]) -> None:
    road, watch = walked
    split, other = ("test", "dev") if road.recipe.eval.split == "test" else ("dev", "test")
    assert watch.asked.keys() == WORK.keys()
    for stage, asked in watch.asked.items():
        assert asked and asked <= kept(road, split), stage
        assert not asked & (kept(road, other) | watch.learned["pretrain"]), stage
