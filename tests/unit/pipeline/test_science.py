"""What the pipeline says of itself is so: what is learned, what is asked, of which model, and every figure beside it.

The stages are run as the pipeline runs them, and watched where nothing can pass by: at the model, whose rows are turned
back into text, and at the engine. A problem is known by the numbers of its question, not by what our code calls it;
figures are worked out again from counts, by other formulas.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import NormalDist
from typing import Any
from zlib import crc32

import pytest
import torch

from sprat.engine import Engine
from sprat.formats.load import load
from sprat.model import Transformer
from sprat.pipeline import controls, data, evaluation, quantize, training
from sprat.pipeline.pipeline import Pipeline
from sprat.pipeline.recipe import load_recipe
from sprat.tasks import GymTask, Sums
from sprat.tokens import Message

SMALL = (
    'data.tasks=[{name="sums",title="sums",settings={min_terms=2,max_terms=3,max_value=9}},'
    '{name="reasoning-gym/chain_sum",title="chain_sum",settings={min_terms=2,max_terms=3,min_digits=1,max_digits=1}}]',
    'data.unseen=[{name="sums",title="longer",settings={min_terms=4,max_terms=4,max_value=9}}]',
    "data.demonstrations=1500", "data.vocab_size=400", "data.test_problems=20", "data.dev_problems=20",
    "data.text_bytes=20000", "pretrain.steps=24", "pretrain.text_share=0.125",
    'pretrain.model={size="pico",changes={hidden_size=16,kv_lora_rank=16,moe_intermediate_size=16,intermediate_size=32,'
    "num_hidden_layers=1,first_k_dense_replace=0}}",
    "rl.steps=2", "rl.format_weight=1.0", "rl.max_tokens=8", "controls.rft.max_tokens=8", "eval.max_tokens=16",
    "eval.side_problems=5", "quant.head_bits=4", "distill.examples=40", "distill.task_share=0.25",
    "distill.steps=20",
)  # fmt: skip
Form = tuple[int, ...]
WORK: dict[str, Callable[[Pipeline], None]] = {
    "pretrain": training.pretrain,
    "sft": training.sft,
    "rl-seed0": lambda pipeline: training.rl(pipeline, 0),
    "rft": controls.rft,
    "pretrain-more": controls.pretrain_more,
    "student-scratch": controls.student_scratch,
    "distill": training.distill,
    "quantize": quantize.quantize,
}


def form(question: str) -> Form:
    """The signed terms of a sum, sorted."""
    terms = question.rpartition(":")[2]
    return tuple(sorted(int(sign + digits) for sign, digits in re.findall(r"([+-]?) ?(\d+)", terms)))


class Watch:
    """What each stage learned from, what it was asked, and of which weights."""

    def __init__(self) -> None:
        self.stage, self.scoring = "", False
        self.learned = defaultdict[str, set[Form]](set)  # problems that were trained on, or answered for that
        self.asked = defaultdict[str, set[Form]](set)  # problems that were answered for a score
        self.text = defaultdict[str, str](str)  # rows that weights learned from
        self.said = defaultdict[str, list[str]](list)  # answers that were drawn to learn from
        self.drawn_by = defaultdict[str, set[float]](set)  # models that they came from, by their norm's weights
        self.scored = defaultdict[str, set[float]](set)
        self.first = dict[str, float]()  # the model that was asked first


def known_by(model: Transformer) -> float:
    """A number that is another for any other weights; quantised ones keep their norms."""
    return float(model.norm.weight.detach().double().sum())


@pytest.fixture(scope="module", params=["test", "dev"])
def walked(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Pipeline, Watch]]:
    """A pipeline that was walked under watch; whatever a teacher answers counts as right, so that it is taught."""
    folder, watch = tmp_path_factory.mktemp("held"), Watch()
    (folder / "text").mkdir()
    for name in "abcd":
        (folder / "text" / f"{name}.txt").write_text("a small fish in a wide sea. " * 300)
    pipeline = Pipeline(folder / "road", load_recipe("tiny", (*SMALL, f"eval.split={request.param}")))
    hidden, generate, scores = Transformer.hidden, Engine.generate, evaluation.score_tasks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)  # no power fails here
        data.data(pipeline, folder / "text")
        tokenizer = pipeline.data_artifact.tokenizer()

        def learning(self: Transformer, tokens_BT: torch.Tensor, **more: Any) -> Any:
            if torch.is_grad_enabled():
                text = " ".join(tokenizer.decode(row) for row in tokens_BT.tolist())
                found = re.findall(r"<\|user\|>(.*?)<\|assistant\|>", text, re.S)
                watch.learned[watch.stage].update(map(form, found))
                watch.text[watch.stage] += text
            return hidden(self, tokens_BT, **more)

        def asking(self: Engine, prompts: Any, *rest: Any, **more: Any) -> Any:
            outputs = generate(self, prompts, *rest, **more)
            found = {form(prompt[-1].content) for prompt in prompts if isinstance(prompt[-1], Message)}
            (watch.asked if watch.scoring else watch.learned)[watch.stage].update(found)
            (watch.scored if watch.scoring else watch.drawn_by)[watch.stage].add(known_by(self.model))
            watch.first.setdefault(watch.stage, known_by(self.model))
            if not watch.scoring:
                watch.said[watch.stage] += [output.text for output in outputs if output.finish_reason == "stop"]
            return outputs

        def scoring(*rest: Any, **more: Any) -> Any:
            watch.scoring = True
            try:
                return scores(*rest, **more)
            finally:
                watch.scoring = False

        patch.setattr(Transformer, "hidden", learning)
        patch.setattr(Engine, "generate", asking)
        patch.setattr(evaluation, "score_tasks", scoring)
        patch.setattr("sprat.post.distill.is_correct", lambda score: True)
        for kind in (GymTask, Sums):  # models that know nothing are right about as often as not
            patch.setattr(kind, "score", lambda self, problem, said: crc32(f"{problem.question}{said}".encode()) % 2.0)
        for stage, work in WORK.items():
            watch.stage = stage
            work(pipeline)
        yield pipeline, watch


def facts(pipeline: Pipeline, run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((pipeline.run_folder(run) / "run.json").read_text())["facts"]
    return found


def kept(pipeline: Pipeline, split: str) -> set[Form]:
    """The held-out problems of ``split``, read from the files that the data stage left."""
    files = sorted((pipeline.run_folder("data") / "artefact" / "problems" / split).glob("*.jsonl"))
    assert len(files) == 3
    return {form(json.loads(line)["question"]) for file in files for line in file.read_text().splitlines()}


def test_no_stage_learns_from_a_problem_of_dev_or_test(walked: tuple[Pipeline, Watch]) -> None:
    pipeline, watch = walked
    held = kept(pipeline, "test") | kept(pipeline, "dev")
    assert len(held) > 60
    for stage in ("pretrain", "sft", "rft", "pretrain-more", "student-scratch", "distill", "rl-seed0"):
        assert watch.learned[stage] and not watch.learned[stage] & held, stage
    assert len(watch.learned["pretrain"]) > 100


def test_no_score_comes_from_a_problem_of_another_split(walked: tuple[Pipeline, Watch]) -> None:
    pipeline, watch = walked
    split, other = ("test", "dev") if pipeline.recipe.eval.split == "test" else ("dev", "test")
    assert watch.asked.keys() == WORK.keys()
    for stage, asked in watch.asked.items():
        assert asked and asked <= kept(pipeline, split), stage
        assert not asked & (kept(pipeline, other) | watch.learned["pretrain"]), stage


def test_each_score_is_of_the_stages_own_model(walked: tuple[Pipeline, Watch]) -> None:
    pipeline, watch = walked
    own = {stage: known_by(load(pipeline.run_folder(stage))[0]) for stage in WORK}
    assert len(set(own.values())) >= len(WORK) - 2  # RL had nothing to learn here; INT4 keeps the student's norms
    assert {stage: watch.scored[stage] for stage in WORK} == {stage: {own[stage]} for stage in WORK}


def test_answers_are_drawn_from_the_model_that_is_said_to_give_them(walked: tuple[Pipeline, Watch]) -> None:
    pipeline, watch = walked
    base, student = (known_by(load(pipeline.run_folder(name))[0]) for name in ("pretrain", "distill"))
    assert watch.drawn_by["rft"] == {base} and base in watch.drawn_by["rl-seed0"]
    assert watch.drawn_by["distill"] == {known_by(load(pipeline.run_folder("rl-seed0"))[0])}
    assert watch.first["quantize"] == student  # for what GPTQ hears


def test_students_learn_from_their_teachers_answers_and_the_twin_does_not(walked: tuple[Pipeline, Watch]) -> None:
    pipeline, watch = walked
    for stage in ("rft", "distill"):
        heard = [f">{said}<" for said in watch.said[stage] if len(said) > 3]
        found = sum(said in watch.text[stage] for said in heard)
        assert heard and found > (0.2 * len(heard) if stage == "distill" else 3), stage  # rft makes four steps
    odd = [f">{said}<" for said in watch.said["distill"] if len(said) > 3 and not said.lstrip("-").isdigit()]
    assert odd and not any(said in watch.text["student-scratch"] for said in odd)
    assert len(watch.learned["student-scratch"]) <= 40 < len(watch.learned["distill"])  # worked examples that there are


def test_demonstrations_show_their_thinking_and_half_of_what_is_found_does_not(walked: tuple[Pipeline, Watch]) -> None:
    _, watch = walked
    shown = {stage: re.findall(r"<think>(.*?)</think>", watch.text[stage], re.S) for stage in ("pretrain", "sft")}
    assert shown["sft"] and all(shown["sft"])
    assert 0.4 < sum(not thought for thought in shown["pretrain"]) / len(shown["pretrain"]) < 0.6


def test_text_has_its_share_of_the_rows(walked: tuple[Pipeline, Watch]) -> None:
    _, watch = walked
    for stage in ("pretrain", "pretrain-more"):
        text = watch.text[stage]
        found = text.count("wide sea") * len("a small fish in a wide sea. ") / len(text)
        assert 0.05 < found < 0.35, (stage, found)


def test_p_values_and_losses_follow_from_the_counts(walked: tuple[Pipeline, Watch]) -> None:
    """Two proportions with a pooled deviation, from the normal distribution of the standard library."""
    pipeline, _ = walked
    chance = set[float]()
    before = {"sft": "pretrain", "rl-seed0": "pretrain", "rft": "pretrain", "pretrain-more": "pretrain"}
    for stage, start in {**before, "quantize": "distill"}.items():
        told = {row["task"]: row for row in facts(pipeline, stage)["significance"]}
        pairs = zip(greedy(pipeline, start), greedy(pipeline, stage), strict=False)
        for old, new in pairs:
            row, n = told[new["task"]], old["count"]
            assert old["task"] == new["task"] and n == new["count"]
            assert row["before"] == old["correct"] / n and row["after"] == new["correct"] / n
            pooled = (old["correct"] + new["correct"]) / (2 * n)
            spread = math.sqrt(pooled * (1 - pooled) * 2 / n)
            z = abs(old["correct"] - new["correct"]) / n / spread if spread else 0.0
            assert row["p"] == pytest.approx(2 * NormalDist().cdf(-z))
            chance.add(row["p"])
    assert len(chance) > 3
    for old, new in zip(greedy(pipeline, "distill"), greedy(pipeline, "quantize"), strict=False):
        lost = facts(pipeline, "quantize")["relative_loss"][new["task"]]
        assert old["correct"] and lost == pytest.approx(1 - new["correct"] / old["correct"])


@pytest.mark.parametrize("run", ["distill", "quantize"])
def test_a_run_is_scored_by_the_model_that_it_keeps(walked: tuple[Pipeline, Watch], run: str) -> None:
    """Asked again, the kept model says the same: answers, their lengths, what is right of them."""
    pipeline, _ = walked
    rows = evaluation.score_tasks(pipeline, *load(pipeline.run_folder(run)), ("greedy",), unseen=run == "distill")
    told = [{key: row[key] for key in ("task", "correct", "mean_tokens", "samples")} for row in greedy(pipeline, run)]
    assert told == [{key: row[key] for key in ("task", "correct", "mean_tokens", "samples")} for row in rows]


def greedy(pipeline: Pipeline, run: str) -> list[dict[str, Any]]:
    return [row for row in facts(pipeline, run)["scores"] if row["label"] == "greedy"]


def test_what_was_never_trained_is_not_counted_as_trained(walked: tuple[Pipeline, Watch]) -> None:
    pipeline, _ = walked
    assert [(row["task"], row["trained"]) for row in greedy(pipeline, "rl-seed0")] == [
        ("sums", True), ("chain_sum", True), ("longer", False)
    ]  # fmt: skip


def test_bits_per_byte_are_those_of_the_text_that_is_held_out(walked: tuple[Pipeline, Watch]) -> None:
    """Log-probabilities of the pre-trained model, row by row, over the bytes of the held-out documents."""
    pipeline, _ = walked
    model, _ = load(pipeline.run_folder("pretrain"))
    ((domain, told),) = facts(pipeline, "pretrain")["bits_per_byte"].items()
    rows, bits = pipeline.data_artifact.held_out(domain), 0.0
    for tokens, mask, segments in zip(rows.tokens, rows.loss_mask, rows.segments, strict=True):
        ids = torch.from_numpy(tokens).long()
        with torch.no_grad():
            logits = model(ids[None, :-1], segments_BT=torch.from_numpy(segments).long()[None, :-1])[0].double()
        place = torch.arange(len(ids) - 1)
        found = -logits.log_softmax(-1)[place, ids[1:]] / math.log(2)
        bits += float(found[torch.from_numpy(mask[1:]).bool()].sum())
    held = json.loads((pipeline.run_folder("data") / "artefact" / "heldout" / "bytes.json").read_text())[domain]
    assert told["model"] == pytest.approx(bits / held, rel=1e-4)
    assert 200 < held < 1000  # what the data stage says that it holds out of 8,400 bytes


def test_the_cost_of_a_student_has_its_teachers_in_it(walked: tuple[Pipeline, Watch]) -> None:
    pipeline, _ = walked
    spent = {
        run: json.loads((pipeline.run_folder(run) / "run.json").read_text())["flops"]
        for run in ("distill", "rft", "sft")
    }
    teacher = facts(pipeline, "distill")["traces"]["tokens"]
    assert teacher > 0 and spent["distill"] > 0 and spent["rft"] > spent["sft"] * 0.5
    for run in ("pretrain", "sft", "rl-seed0", "rft", "pretrain-more", "distill", "student-scratch"):
        whole = json.loads((pipeline.run_folder(run) / "run.json").read_text())["device_seconds"]
        assert 0 < facts(pipeline, run)["training_cpu_seconds"] < whole, run


def test_held_out_text_may_be_scored_during_pretraining_which_changes_nothing(tmp_path: Path) -> None:
    """The last score is what the finished model is said to have; the artefact is that of a run without scores."""
    recipe = load_recipe("tiny", (*SMALL, "pretrain.steps=6", "pretrain.batch_rows=4"))
    records, rows = [], []
    for name, every in (("scored", 3), ("plain", 0)):
        pipeline = Pipeline(tmp_path / name, recipe)
        data.data(pipeline)
        training.pretrain(pipeline, eval_every=every)
        folder = pipeline.run_folder("pretrain")
        records.append(json.loads((folder / "run.json").read_text()))
        rows.append([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])
    assert records[0]["artefact_digest"] == records[1]["artefact_digest"]
    known = records[0]["facts"]["bits_per_byte"]
    assert known == records[1]["facts"]["bits_per_byte"] and len(known) > 1
    scored = {row["step"]: row for row in rows[0] if any(name.startswith("eval_bits_per_byte.") for name in row)}
    assert sorted(scored) == [3, 6]
    for domain, scores in known.items():
        assert scored[6][f"eval_bits_per_byte.{domain}"] == scores["model"] != scored[3][f"eval_bits_per_byte.{domain}"]
    assert rows[1] == [{n: v for n, v in row.items() if "." not in n} for row in rows[0] if "loss" in row]
