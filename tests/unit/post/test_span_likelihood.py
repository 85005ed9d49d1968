"""A teacher whose tokenizer cuts text otherwise still says how likely each piece is, and the student comes to agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sprat.config.sizes import size
from sprat.config.teach import TeachConfig
from sprat.data.conversations import read_examples
from sprat.data.loader import gather_rows
from sprat.errors import ConfigError, DataError
from sprat.formats.load import load, save
from sprat.model import Transformer
from sprat.post import collect, teach
from sprat.post.examples import encode_examples
from sprat.post.span_likelihood import align, span_loss, span_targets
from sprat.tokens import Tokenizer, encode_conversation
from sprat.trust.verify import verify

TEXT = ["what is the sum of one and two? it is three, I believe."] * 20
CONFIG = TeachConfig.model_validate({"seq_len": 96, "balance_weight": 0.0})


@pytest.fixture(scope="module")
def tokenizers() -> tuple[Tokenizer, Tokenizer]:
    """A teacher's with long words, a student's with next to none."""
    return Tokenizer.train(TEXT, 360, numbers=10), Tokenizer.train(["ab\n"] * 4, 300, numbers=10)


def pico(tokenizer: Tokenizer, seed: int) -> Transformer:
    ids = tokenizer.special_ids
    shape = {"bos_token_id": ids.bos, "eos_token_id": ids.eos, "pad_token_id": ids.pad}
    return Transformer.create(size("pico", vocab_size=tokenizer.vocab_size, num_hidden_layers=1, **shape), seed)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"prompt": f"what is the sum of {n}", "completion": "it is three, I believe."} for n in range(8)]
    (tmp_path / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "traces.jsonl"


@given(st.binary(min_size=1, max_size=30), st.data())
@settings(max_examples=60, deadline=None)
def test_spans_are_the_finest_common_pieces(text: bytes, draw: st.DataObject) -> None:
    cuts = [sorted(draw.draw(st.sets(st.integers(1, len(text)), max_size=8)) | {len(text)}) for _ in range(2)]
    sides = [[text[a:b] for a, b in zip([0, *each], each, strict=False)] for each in cuts]
    spans = align(*sides)
    ends = [len(b"".join(sides[0][:own])) for own, _ in spans]
    assert ends == [len(b"".join(sides[1][:other])) for _, other in spans] == sorted({*cuts[0]} & {*cuts[1]})


def test_an_end_token_is_a_span_of_its_own_and_other_texts_have_none() -> None:
    assert align([b"a", b""], [b"a", b"", b""]) == [(1, 1), (2, 3)]
    assert align([b"a"], [b"a", b""]) == [(1, 1)]
    assert align([b"a", b""], [b"b", b""]) == [] == align([b""], [b""])


def test_the_teachers_likelihood_of_a_span_is_that_of_its_tokens(
    tokenizers: tuple[Tokenizer, Tokenizer], data: Path
) -> None:
    theirs, own = tokenizers
    teacher, examples = pico(theirs, 1), read_examples(data).examples
    rows = encode_examples(own, examples, CONFIG).rows
    targets = span_targets(teacher, theirs, own, examples, rows, CONFIG)
    assert targets.counts["aligned"] == 8 and targets.counts["unaligned"] == 0
    total = 0.0
    for example in examples:
        [(ids, mask)] = encode_conversation(theirs, example.messages)
        logprobs = teacher(torch.tensor([ids]))[0, :-1].log_softmax(-1).gather(1, torch.tensor(ids)[1:, None])[:, 0]
        total += logprobs[torch.tensor(mask[1:]) > 0].sum().item()
    assert sum(said.sum().item() for _, said in targets.table.values()) == pytest.approx(total, rel=1e-4)
    batch = gather_rows(rows, range(rows.num_rows))
    spans = torch.stack([span for span, _ in targets.table.values()])
    assert targets.counts["spans"] > 8 * 5
    assert (batch.targets_BT[spans >= 0] >= 0).all()  # only what is learned lies in a span


def test_the_student_that_is_its_teacher_has_nothing_to_learn_and_shares_add_up(
    tokenizers: tuple[Tokenizer, Tokenizer], data: Path
) -> None:
    _, own = tokenizers
    teacher, examples = pico(own, 1), read_examples(data).examples
    rows = encode_examples(own, examples, CONFIG).rows
    loss_fn = span_loss(span_targets(teacher, own, own, examples, rows, CONFIG), 1.0)
    batch = gather_rows(rows, range(rows.num_rows))
    same = loss_fn(teacher, batch, CONFIG)
    same.total.backward()
    assert same.metrics["divergence"] == pytest.approx(0, abs=1e-5)
    assert max(p.grad.abs().max().item() for p in teacher.parameters() if p.grad is not None) < 1e-3
    other = pico(own, 2)
    whole = loss_fn(other, batch, CONFIG)
    parts = [loss_fn(other, batch[row : row + 1], CONFIG, batch) for row in range(len(batch))]
    assert whole.metrics["divergence"] > 1e-4
    for name in ("loss", "divergence"):
        assert sum(part.metrics[name] for part in parts) == pytest.approx(whole.metrics[name], rel=1e-4)
    assert sum(part.total.item() for part in parts) == pytest.approx(whole.total.item(), rel=1e-4)


def test_a_student_with_another_tokenizer_comes_to_find_likely_what_its_teacher_does(
    tokenizers: tuple[Tokenizer, Tokenizer], data: Path, tmp_path: Path
) -> None:
    theirs, own = tokenizers
    for name, tokenizer, seed in (("teacher", theirs, 1), ("student", own, 2)):
        save(pico(tokenizer, seed), tokenizer, tmp_path / name)
    taught = teach.finetune.finetune(
        tmp_path / "teacher", data, tmp_path / "runs" / "taught",
        TeachConfig.model_validate({"epochs": 30, "seq_len": 96, "optim": {"adam_lr": 0.01}}),
    )  # fmt: skip
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"question": f"what is the sum of {n}"}) + "\n" for n in range(8)))
    config = TeachConfig.model_validate(
        {"epochs": 6, "seq_len": 96, "optim": {"adam_lr": 0.01}, "spans": {"weight": 1.0}, "traces": {"max_tokens": 40}}
    )
    out = tmp_path / "runs" / "mine"
    traces = collect.collect_traces(str(taught.folder), teach.traces_folder(out), config.traces, data=questions)
    run = teach.distill(str(taught.folder), str(tmp_path / "student"), out, config, traces)
    assert run.facts["spans"]["spans"] > 8 and run.facts["spans"]["unaligned"] == 0
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    divergences = [row["divergence"] for row in rows if "divergence" in row]
    assert divergences[-1] < 0.5 * divergences[0]
    assert all(finding.ok for finding in verify(tmp_path / "runs"))
    with pytest.raises(ConfigError, match="two ways"):
        teach.distill(str(taught.folder), str(tmp_path / "student"), out, config.replace(logits={}), traces)
    with pytest.raises(ConfigError, match="whole examples"):
        model, tokenizer = load(tmp_path / "teacher")
        cut = config.replace(examples={"too_long": "cut"})
        examples = read_examples(data).examples
        span_targets(model, tokenizer, tokenizer, examples, encode_examples(tokenizer, examples, config).rows, cut)
    with pytest.raises(DataError, match="no answer has the same bytes"):
        other = read_examples(data).examples[:0]
        span_targets(model, tokenizer, tokenizer, other, encode_examples(tokenizer, examples, config).rows, config)
