"""A student learns from any teacher; no answer is paid for twice, and what is learned was looked at."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from sprat.config.teach import TeachConfig, TracesConfig
from sprat.engine import Engine, Sampling
from sprat.errors import ConfigError, DataError, MachineError, ServeError, TrainingError
from sprat.files.lock import lock_folder
from sprat.formats.load import load, save
from sprat.model import Transformer
from sprat.post.collect import collect_traces
from sprat.post.teach import distill, traces_folder
from sprat.post.teachers import Limits
from sprat.tokens import Tokenizer
from sprat.trust.run import Run
from sprat.trust.verify import verify
from tests.unit.post.fake_teacher import completion, fake_teacher, reply

QUICK = Limits(concurrency=3, seconds=5, tries=2, backoff=0.01)
SETTINGS = {"teacher_model": "wise", "licence": "MIT", "input_price": 2000, "output_price": 3000}
CONFIG = TracesConfig.model_validate(SETTINGS)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twenty questions, one of them twice and one that is none."""
    path = tmp_path / "questions.jsonl"
    rows = [{"question": str(n)} for n in range(20)] + [{"question": " 7 "}, {"answer": "7"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "mine-traces"


def honest(body: dict[str, Any], before: int) -> Any:
    question = body["messages"][-1]["content"]
    return reply(completion(f"it is {question}", id=f"id of {question}"))


def test_answers_are_kept_with_all_that_is_known_of_them(data: Path, folder: Path, tmp_path: Path) -> None:
    with fake_teacher(honest) as fake:
        run = collect_traces(fake.url, folder, CONFIG, data=data, limits=QUICK)
        again = collect_traces(fake.url, folder, CONFIG, data=data, limits=QUICK)
    assert again.done and Counter(fake.log) == Counter(str(n) for n in range(20))
    rows = lines(run.artifact / "traces.jsonl")
    assert [row["messages"][-1]["content"] for row in rows] == [f"it is {n}" for n in range(20)]
    assert all(row["licence"] == "MIT" and row["model"] == "wise" and row["response_id"] for row in rows)
    assert {row["nano_yuan"] for row in rows} == {10 * 2000 + 5 * 3000}
    assert run.facts["teacher_nano_yuan"] == 20 * 35_000 and run.facts["kept"] == 20
    assert {each["why"]: each["count"] for each in run.facts["skipped"]} == {
        "records: a question that an earlier record has": 1,
        "records: no question": 1,
    }
    assert run.identity["inputs"]["teacher"]["settings"] == {"url": fake.url, "model": "wise"}
    assert all(finding.ok for finding in verify(tmp_path / "runs"))


def test_lies_are_counted_by_kind_and_not_learned(data: Path, folder: Path) -> None:
    lies: dict[str, Any] = {
        "1": completion("", choices=[{"message": {"content": "the"}, "finish_reason": "length"}]),
        "2": completion("4", model="cheap"),
        "3": completion("", choices=[]),
        "4": b"<html>",
        "5": completion("it is 6", id="id of 6"),
    }

    def answer(body: dict[str, Any], before: int) -> Any:
        question = body["messages"][-1]["content"]
        return reply(lies[question]) if question in lies else honest(body, before)

    with fake_teacher(answer) as fake:
        run = collect_traces(fake.url, folder, CONFIG, data=data, limits=QUICK)
        assert Counter(fake.log).most_common(1)[0][1] == 1
    assert run.facts["kept"] == 15 and run.facts["rejected"] == {
        "cut off at max_tokens": 1,
        "another model": 1,
        "no choices": 1,
        "broken JSON": 1,
        "the very response of another question": 1,
    }
    rejected = lines(run.artifact / "rejected.jsonl")
    assert len(rejected) == 5 and sum(row["nano_yuan"] or 0 for row in rejected) == 4 * 35_000  # paid all the same


def test_too_many_lies_stop_it_and_nothing_is_lost(data: Path, folder: Path) -> None:
    page = (200, {"Content-Type": "text/html"}, b"<html>Please log in</html>")
    with fake_teacher(
        lambda body, before: honest(body, before) if len(body["messages"][-1]["content"]) == 1 else page
    ) as fake:
        limits = Limits(concurrency=1, max_faults=0.2, min_asked=5)
        with pytest.raises(ServeError, match=r"of \d+ questions have no good answer \(\d no JSON: text/html\)"):
            collect_traces(fake.url, folder, CONFIG, data=data, limits=limits)
    assert sum(not row["fault"] for row in lines(folder / "checkpoints" / "traces.jsonl")) == 10
    with fake_teacher(honest) as mended:
        with pytest.raises(ServeError, match="have no good answer"):  # a server that is down: other kinds, same end
            collect_traces("http://127.0.0.1:9/v1", folder.with_name("b"), CONFIG, data=data, limits=QUICK)
        assert not mended.log


def test_a_longer_limit_and_more_questions_ask_only_for_what_is_missing(data: Path, folder: Path) -> None:
    def stingy(body: dict[str, Any], before: int) -> Any:
        cut = {"message": {"content": "it"}, "finish_reason": "length"}
        return (
            reply(completion("it", choices=[cut]))
            if body["messages"][-1]["content"] == "3" and body["max_tokens"] < 99
            else honest(body, before)
        )

    with fake_teacher(stingy) as fake:
        collect_traces(fake.url, folder, CONFIG.replace(max_tokens=50), data=data, limits=QUICK)
        with data.open("a") as stream:
            stream.write('{"question": "one more"}\n')
        run = collect_traces(fake.url, folder, CONFIG.replace(max_tokens=99), data=data, limits=QUICK)
        counts = Counter(fake.log)
    assert counts.pop("3") == 2 and set(counts.values()) == {1} and run.facts["kept"] == 21
    assert run.facts["taken_over"] == 19


def test_only_right_answers_of_a_task_are_learned_and_none_it_is_tested_on(folder: Path, tmp_path: Path) -> None:
    task, tested = tmp_path / "sums.jsonl", tmp_path / "exam.jsonl"
    rows = [{"question": f"What is {n} plus one?", "answer": n + 1} for n in range(10)]
    task.write_text("".join(json.dumps(row) + "\n" for row in [{"split": "train"}, *rows]))
    tested.write_text(json.dumps({"id": "e4", "question": "what is 4 plus one", "answer": 5}) + "\n")

    def answer(body: dict[str, Any], before: int) -> Any:
        n = int(body["messages"][-1]["content"].split()[2])
        return reply(completion(f"{n + 1 if n % 2 else n}", id=f"id of {n}"))

    with fake_teacher(answer) as fake:
        run = collect_traces(fake.url, folder, CONFIG, task=str(task), held_out=[str(tested)], limits=QUICK)
        assert not any(" 4 " in question for question in fake.log) and len(fake.log) == 9
        with pytest.raises(DataError, match="no question for training"):
            collect_traces(fake.url, folder.with_name("b"), CONFIG, task=str(tested))
    assert run.facts["held_out_overlap"] == {"exam": ["e4"]} and run.facts["judge"] == "sums"
    assert run.facts["kept"] == 5 and run.facts["rejected"] == {"a wrong answer": 4}


def test_a_damaged_answer_is_named_by_its_line(data: Path, folder: Path) -> None:
    broken = (200, {"Content-Type": "text/html"}, b"")
    with fake_teacher(
        lambda body, before: honest(body, before) if len(body["messages"][-1]["content"]) == 1 else broken
    ) as fake:
        limits = Limits(concurrency=1, max_faults=0.0, min_asked=5)
        with pytest.raises(ServeError):
            collect_traces(fake.url, folder, CONFIG, data=data, limits=limits)
        log = folder / "checkpoints" / "traces.jsonl"
        log.write_text(log.read_text().replace('"key"', '"kee"', 2).replace('"kee"', '"key"', 1))
        with pytest.raises(DataError, match=r"traces.jsonl, line 2\).*asked again"):
            collect_traces(fake.url, folder, CONFIG, data=data, limits=limits)


def test_two_cannot_ask_at_once(data: Path, folder: Path) -> None:
    with fake_teacher(honest) as fake:
        (folder / "checkpoints").mkdir(parents=True)
        with lock_folder(folder / "checkpoints"), pytest.raises(MachineError, match="another sprat"):
            collect_traces(fake.url, folder, CONFIG, data=data, limits=QUICK)
        assert not fake.log


@pytest.mark.parametrize(
    ("teacher", "changes", "said"),
    [
        ("https://host/v1", {"licence": " "}, "no licence was stated"),
        ("https://host/v1", {"teacher_model": ""}, "--teacher-model NAME"),
        ("https://host/v1", {"output_price": None}, "one price of two"),
        ("https://host/v1", {"samples": 2, "temperature": 0}, "all alike"),
        ("https://host/v1?a=b", {}, "a query"),
    ],
)
def test_what_cannot_be_asked_is_said_before_anything_is_made(
    teacher: str, changes: dict[str, Any], said: str, data: Path, folder: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        collect_traces(teacher, folder, CONFIG.replace(**changes), data=data)
    with pytest.raises(ConfigError, match="neither questions nor a task"):
        collect_traces(teacher, folder, CONFIG)
    assert not folder.parent.exists()


@pytest.fixture
def teacher_folder(guesser: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    save(guesser, tokenizer, tmp_path / "teacher")
    return tmp_path / "teacher"


TEACH = TeachConfig.model_validate(
    {
        "epochs": 30,
        "seq_len": 32,
        "optim": {"adam_lr": 0.01},
        "traces": {"max_tokens": 16, "samples": 4, "temperature": 1.0},
    }
)


def test_a_fresh_student_learns_from_a_teacher_on_this_machine(
    teacher_folder: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "runs" / "mine"
    traces = collect_traces(str(teacher_folder), traces_folder(out), TEACH.traces, data=data)
    rows = lines(traces.artifact / "traces.jsonl")
    engine = Engine(*load(teacher_folder))
    expected = engine.generate(["5"], Sampling(temperature=1.0, max_tokens=16, seed=0, n=4))
    said = {
        (row["messages"][-1]["content"], row["messages"][-1].get("reasoning_content", ""))
        for row in rows
        if row["messages"][0]["content"] == "5"
    }
    assert said == {
        (each.text, each.reasoning) for each in expected if each.finish_reason == "stop" and each.text.strip()
    }
    run = distill(str(teacher_folder), "pico", out, TEACH.replace(epochs=3), traces)
    student, tokenizer = load(run.folder)
    assert student.config.hidden_size == 64 and tokenizer.digest == load(teacher_folder)[1].digest
    assert run.facts["validation_after"]["loss"] < run.facts["validation_before"]["loss"]
    assert run.identity["inputs"]["traces"]["path"] == "mine-traces"
    assert all(finding.ok for finding in verify(tmp_path / "runs"))


def test_another_student_costs_no_answer(
    teacher_folder: Path, data: Path, model: Transformer, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save(model, tokenizer, tmp_path / "base")
    out = tmp_path / "runs" / "mine"
    with fake_teacher(honest) as fake:
        config = TEACH.replace(traces=CONFIG.model_dump(), epochs=2, lora={"rank": 2})

        def learned(**changes: Any) -> Run:
            traces = collect_traces(fake.url, traces_folder(out), config.traces, data=data, limits=QUICK)
            return distill(fake.url, str(tmp_path / "base"), out, config.replace(**changes), traces)

        first, second = learned(), learned(seed=1)
        assert len(fake.log) == 20
        with pytest.raises(ConfigError, match="--tokenizer MODEL"):
            distill(
                fake.url, "pico", out, config, collect_traces(fake.url, traces_folder(out), config.traces, data=data)
            )
    assert (second.artifact / "adapter").is_dir() and second.set_aside is not None and first.done
    ids = torch.tensor([tokenizer.encode("12")])
    assert not torch.equal(load(second.folder)[0](ids), load(second.set_aside)[0](ids))


def test_a_teacher_that_never_ends_is_one_sentence(teacher_folder: Path, data: Path, folder: Path) -> None:
    with pytest.raises(TrainingError, match="not one answer of the teacher can be learned: 20 cut off"):
        collect_traces(str(teacher_folder), folder, TracesConfig(max_tokens=1), data=data)


@pytest.mark.parametrize(
    "broken",
    [
        reply({"error": {"code": 502, "message": "upstream"}}),
        reply(completion("", choices=[{"message": {"content": None}, "finish_reason": "stop"}])),
        reply(completion("so", model="cheap")),
    ],
)
def test_when_a_server_is_mended_the_same_command_goes_on(data: Path, folder: Path, broken: Any) -> None:
    healthy = False

    def answer(body: dict[str, Any], before: int) -> Any:
        return honest(body, before) if healthy or body["messages"][-1]["content"] == "0" else broken

    limits = Limits(concurrency=1, min_asked=10)
    with fake_teacher(answer) as fake:
        with pytest.raises(ServeError, match="start the same command again"):
            collect_traces(fake.url, folder, CONFIG, data=data, limits=limits)
        before, healthy = len(fake.log), True
        run = collect_traces(fake.url, folder, CONFIG, data=data, limits=limits)
        counts = Counter(fake.log)
    assert run.facts["kept"] == 20 and run.facts["asked_again"] == before - 1
    assert counts.pop("0") == 1 and len(fake.log) == 20 + before - 1
    written = [row for name in ("traces", "rejected") for row in lines(run.artifact / f"{name}.jsonl")]
    assert len(written) == len(fake.log)
    assert run.facts["teacher_nano_yuan"] == sum(row["nano_yuan"] or 0 for row in written)


def test_a_question_without_room_does_not_end_the_others(teacher_folder: Path, data: Path, folder: Path) -> None:
    context = load(teacher_folder)[0].config.context
    with data.open("a") as stream:
        stream.write(json.dumps({"question": "7 " * context}) + "\n")
    run = collect_traces(str(teacher_folder), folder, TEACH.traces, data=data)
    assert run.facts["unanswered"] == {"too long for the teacher": TEACH.traces.samples}
    assert run.facts["answers"] == 20 * TEACH.traces.samples


def test_ids_that_repeat_do_not_make_answers_of_one_word_one_response(data: Path, folder: Path) -> None:
    """Ollama draws the number of a response out of 999: many short answers share id and text, but not the time."""
    seconds = iter(range(1_700_000_000, 1_700_001_000))

    def answer(body: dict[str, Any], before: int) -> Any:
        return reply(completion("yes", id="chatcmpl-7", created=next(seconds)))

    with fake_teacher(answer) as fake:
        run = collect_traces(fake.url, folder, CONFIG, data=data, limits=QUICK)
    assert run.facts["kept"] == 20 and run.facts["rejected"] == {}


def test_a_response_that_is_sent_again_is_known_by_its_time_too(data: Path, folder: Path) -> None:
    with fake_teacher(lambda body, before: reply(completion("yes", id="chatcmpl-7", created=1_700_000_000))) as fake:
        limits = Limits(concurrency=1, max_faults=1.0)
        run = collect_traces(fake.url, folder, CONFIG, data=data, limits=limits)
    assert run.facts["kept"] == 1 and run.facts["rejected"] == {"the very response of another question": 19}
