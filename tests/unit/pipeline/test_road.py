"""A road of one's own: checked whole before it starts, each stage the run that its verb makes, done once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sprat.config.finetune import load_finetune_config
from sprat.config.pretrain import load_pretrain_config
from sprat.config.teach import load_teach_config
from sprat.errors import CheckpointError, ConfigError
from sprat.formats.export import MANIFEST, Form, export_model
from sprat.formats.load import load, save
from sprat.model import Transformer
from sprat.pipeline.road import read_road, road, select, states
from sprat.post.finetune import finetune
from sprat.post.preparation import resolve_dtype
from sprat.train.pretrain import pretrain
from sprat.trust.verify import verify
from tests.lucky import lucky_shape, lucky_tokenizer

ROAD = """
[[stages]]
name = "small"
uses = "quantize"
model = "chat"

[[stages]]
name = "base"
uses = "train"
model = "fish"
data = "text"
[stages.set]
steps = 3
seq_len = 32
batch_rows = 4

[[stages]]
name = "chat"
uses = "sft"
model = "base"
data = "chat.jsonl"
lora = 2
[stages.set]
steps = 2
seq_len = 32

[[stages]]
name = "scores"
uses = "eval"
model = "small"
text = "text/1.txt"

[[stages]]
name = "folder"
uses = "export"
model = "chat"
[stages.set]
format = "hf"

[[stages]]
name = "merged"
uses = "merge"
model = "base"
adapter = "chat"

[[stages]]
name = "packed"
uses = "export"
model = "small"
[stages.set]
format = "pack-quantized"
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with text, conversations, the road over them, and room for a model."""
    place = tmp_path / "mine"
    for name in ("fish", "text"):
        (place / name).mkdir(parents=True)
    for number in range(20):
        (place / "text" / f"{number}.txt").write_text(f"{number} is the number of this text, and 7 is the next.\n" * 2)
    rows = [{"prompt": str(number), "completion": "7"} for number in range(30)]
    (place / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "road.toml").write_text(ROAD)
    return place


@pytest.mark.slow
def test_a_road_is_gone_once_and_what_verbs_made_is_found(place: Path, tmp_path: Path) -> None:
    out, tokenizer = tmp_path / "runs", lucky_tokenizer()
    save(Transformer.create(lucky_shape(tokenizer), 0), tokenizer, place / "fish")
    stages = read_road(place / "road.toml", out)
    names = [stage.name for stage in stages]
    assert names.index("base") < names.index("chat") < names.index("small") < names.index("scores")
    # what ``sprat train`` and ``sprat sft`` make is what the stages would make
    config = load_pretrain_config(overrides=["steps=3", "seq_len=32", "batch_rows=4"])
    base = pretrain(place / "fish", place / "text", out / "base", config)
    lora = load_finetune_config("sft", lora=2, overrides=["steps=2", "seq_len=32"])
    chat = finetune(out / "base", place / "chat.jsonl", out / "chat", lora)
    assert [stage.state() for stage in stages if stage.name in ("base", "chat", "small")] == ["done", "done", "runs"]
    events: list[tuple[str, str]] = []
    road(stages, place / "road.toml", out, on_progress=lambda stage, event, seconds: events.append((stage, event)))
    records = {name: json.loads((out / name / "run.json").read_text()) for name in names}
    assert records["base"] == base.record and records["chat"] == chat.record
    assert not list(out.glob("*.old-*")) and {name for name, event in events if event == "done"} == set(names)
    assert records["scores"]["facts"]["eval"]["text"]["bits_per_byte"] > 0
    assert records["small"]["facts"]["size_bytes"] < records["small"]["facts"]["dense_bytes"]
    assert records["chat"]["inputs"]["model"]["digest"] == records["base"]["artefact_digest"]
    ids = torch.tensor([load(out / "base")[1].encode("7 is")])
    expected = load(out / "chat")[0](ids)
    for name in ("folder", "merged"):
        assert torch.allclose(load(out / name)[0](ids), expected, atol=1e-5)
    for name, form in (("packed", Form("pack-quantized")), ("folder", Form())):  # as ``sprat export`` writes them
        model = {"packed": "small", "folder": "chat"}[name]
        export_model(out / model, tmp_path / name, form)
        written = {file.name: file.read_bytes() for file in (tmp_path / name).iterdir() if file.name != MANIFEST}
        assert written == {file.name: file.read_bytes() for file in (out / name / "artefact").iterdir()}
    findings = verify(out)
    assert all(finding.ok for finding in findings), [str(finding) for finding in findings if not finding.ok]
    # another setting of one stage makes that and what follows it anew, and nothing else
    changed = ROAD.replace("lora = 2\n[stages.set]\nsteps = 2", "lora = 2\n[stages.set]\nsteps = 1")
    (place / "road.toml").write_text(changed)
    stages = read_road(place / "road.toml", out)
    assert {stage.name: stage.state() for stage in stages}["chat"] == "runs again"
    road(select(stages, start="chat"), place / "road.toml", out, jobs=1)
    again = {name: json.loads((out / name / "run.json").read_text()) for name in names}
    assert again["base"] == records["base"] and (out / "chat.old-1").is_dir()
    assert again["small"]["inputs"]["model"]["digest"] == again["chat"]["artefact_digest"]
    assert all(finding.ok for finding in verify(out))


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('uses = "sft"', 'uses = "stf"', "unknown station uses = 'stf'.*stage 'chat'.*perhaps you mean 'sft'"),
        ("lora = 2", "lroa = 2", "unknown key 'lroa'.*stage 'chat'.*perhaps you mean 'lora'"),
        ("lora = 2", "lora = 0", "lora.*greater than or equal to 1.*stage 'chat'"),
        ("lora = 2", "seq_len = 9", "'seq_len' is a setting of sft.*stage 'chat'.*stages.set"),
        ("steps = 2", 'init_from = "base"', "'init_from' is a key of the stage.*stage 'chat', set.*above"),
        ('uses = "sft"', 'uses = "dpo"\nreplay = "text"', "DPO replays no text.*stage 'chat'"),
        ("steps = 3", "lr = 3", "unknown key 'lr'.*stage 'base', set.*optim.muon_lr"),
        ("steps = 3", "vocab_size = 900", "unknown key 'vocab_size'.*stage 'base', set"),
        ('name = "chat"', 'name = "base"', "two stages are called 'base'"),
        ('name = "chat"', 'name = "../chat"', "'../chat' cannot name a stage.*stage 3"),
        ('data = "chat.jsonl"', 'data = "caht.jsonl"', "data = 'caht.jsonl': nothing lies there.*stage 'chat'"),
        ('model = "base"\ndata', 'model = "bsae"\ndata', "model = 'bsae' is no stage.*stage 'chat'.*the stage 'base'"),
        ('model = "fish"', 'model = "small"', "stages wait for each other: small, base, chat"),
        ('text = "text/1.txt"', "", "an eval asks tasks, or scores a text.*stage 'scores'"),
        ('[[stages]]\nname = "small"', 'stage = 1\n[[stages]]\nname = "small"', "unknown key 'stage'.*'stages'"),
        ('adapter = "chat"', "", "adapter: Field required.*stage 'merged'"),
        ('uses = "quantize"', 'uses = "quantize"\nset.rounding = "gptq"', "stage 'small', set.*calibrate = TEXT"),
    ],
)
def test_what_cannot_be_is_said_with_stage_and_key_before_anything_starts(
    before: str, after: str, said: str, place: Path, tmp_path: Path
) -> None:
    (place / "road.toml").write_text(ROAD.replace(before, after))
    with pytest.raises(ConfigError, match=said):
        read_road(place / "road.toml", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_one_stage_alone_wants_what_it_starts_from(place: Path, tmp_path: Path) -> None:
    stages = read_road(place / "road.toml", tmp_path / "runs")
    assert [stage.name for stage in select(stages, only="base")] == ["base"]
    assert [stage.name for stage in select(stages, start="base")] == [stage.name for stage in stages]
    with pytest.raises(CheckpointError, match="the stage 'base' is not finished.*--only base"):
        select(stages, only="chat")
    with pytest.raises(ConfigError, match="no stage 'chta'.*--from.*there are base, chat"):
        select(stages, start="chta")


def test_names_of_sizes_hubs_and_the_catalogue_are_models(place: Path, tmp_path: Path) -> None:
    for model in ("pico", "smol", "org/fish@v1"):
        (place / "road.toml").write_text(ROAD.replace('model = "fish"', f'model = "{model}"'))
        stages = read_road(place / "road.toml", tmp_path / "runs")
        assert stages[0].config.model == model and stages[0].depends_on == ()


def test_a_teacher_is_a_stage_a_model_or_a_server(place: Path) -> None:
    table = '\n[[stages]]\nname = "pupil"\nuses = "distill"\nmodel = "chat"\nstudent = "pico"\ndata = "chat.jsonl"\n'
    (place / "road.toml").write_text(ROAD + table + "[stages.set]\nlogits = {top_k = 8}\n")
    pupil = next(stage for stage in read_road(place / "road.toml", place / "out") if stage.name == "pupil")
    expected = resolve_dtype(load_teach_config("pico", overrides=["logits.top_k=8"]))
    assert pupil.settings == expected and pupil.depends_on == ("chat",) and pupil.config.student == "pico"
    (place / "road.toml").write_text(table.replace('"chat"', '"http://127.0.0.1:1/v1"'))
    assert read_road(place / "road.toml", place / "out")[0].config.model == "http://127.0.0.1:1/v1"


def test_an_evaluation_is_done_again_when_what_is_asked_is_another(place: Path, tmp_path: Path) -> None:
    tokenizer, out = lucky_tokenizer(), tmp_path / "runs"
    save(Transformer.create(lucky_shape(tokenizer), 0), tokenizer, place / "fish")
    code = "from sprat.tasks import Problem\nfrom judge_of_road import MARK\n"
    code += "class {}:\n    def __len__(self): return 2\n    def problem(self, split, index):\n"
    code += "        return Problem('doubles', index, f'Twice {{index}}?', '0')\n"
    code += "    def score(self, problem, answer): return {}\n"
    first, second = code.format("First", "MARK"), code.format("Second", "1.0 - MARK")
    (place / "mine.py").write_text(first + second)
    (place / "judge_of_road.py").write_text("MARK = 0.0\n")
    stage = '[[stages]]\nname = "scores"\nuses = "eval"\nmodel = "fish"\n{}\nset = {{max_tokens = 2}}\n'

    def accuracy(what: str) -> float:
        (place / "road.toml").write_text(stage.format(what))
        road(read_road(place / "road.toml", out), place / "road.toml", out, jobs=1)
        eval_facts = json.loads((out / "scores" / "run.json").read_text())["facts"]["eval"]
        return float(eval_facts["scores"][0]["accuracy"])

    assert accuracy('tasks = ["mine.py:First"]') == 0.0
    assert accuracy('tasks = ["mine.py:Second"]') == 1.0, "the score of another class was taken for this one's"
    (place / "judge_of_road.py").write_text("MARK = 1.0\n")
    assert accuracy('tasks = ["mine.py:Second"]') == 0.0, "a score of the judge of before was kept"
    (place / "q.jsonl").write_text('{"question": "Twice 1?", "answer": "two"}\n')
    assert accuracy('tasks = ["q.jsonl"]') == 0.0


def test_a_stage_of_fine_tuning_goes_on_from_another_one(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, out = lucky_tokenizer(), tmp_path / "runs"
    save(Transformer.create(lucky_shape(tokenizer), 0), tokenizer, place / "fish")
    stage = '[[stages]]\nname = "{}"\nuses = "sft"\nmodel = "fish"\ndata = "chat.jsonl"\nlora = 2\n{}'
    settings = "[stages.set]\nsteps = 2\nseq_len = 32\n"
    second, first = stage.format("second", 'init_from = "first"\n'), stage.format("first", "")
    (place / "road.toml").write_text(second + settings + first + settings)
    monkeypatch.chdir(tmp_path)  # paths are relative to the file
    stages = read_road(place / "road.toml", out)
    assert [each.name for each in stages] == ["first", "second"] and stages[1].depends_on == ("first",)
    road(stages, place / "road.toml", out)
    first_facts, second_facts = (json.loads((out / n / "run.json").read_text())["facts"] for n in ("first", "second"))
    assert second_facts["validation_before"] == first_facts["validation_after"] != first_facts["validation_before"]


def test_a_dry_run_says_what_the_road_then_does(place: Path, tmp_path: Path) -> None:
    tokenizer, out = lucky_tokenizer(), tmp_path / "runs"
    save(Transformer.create(lucky_shape(tokenizer), 0), tokenizer, place / "fish")
    (place / "q.jsonl").write_text('{"question": "Twice 1?", "answer": "2"}\n')
    chat = '[[stages]]\nname = "chat"\nuses = "sft"\nmodel = "fish"\ndata = "chat.jsonl"\n'
    chat += "set = {steps = 1, seq_len = 32, eval = {max_tokens = 2}}\n"
    asked = '[[stages]]\nname = "asked"\nuses = "eval"\nmodel = "{}"\ntasks = ["q.jsonl"]\nset = {{max_tokens = 2}}\n'
    path = place / "road.toml"

    def promised_and_done(text: str) -> list[str]:
        path.write_text(text)
        stages = read_road(path, out)
        promised, before = states(stages), [(stage.folder / "run.json").read_bytes() for stage in stages]
        road(stages, path, out, jobs=1)
        after = [(stage.folder / "run.json").read_bytes() for stage in stages]
        was_made = ["done" if a == b else "runs again" for a, b in zip(before, after, strict=True)]
        assert promised == was_made
        return promised

    whole = chat + asked.format("chat")
    path.write_text(whole)
    assert states(read_road(path, out)) == ["runs", "runs"]
    road(read_road(path, out), path, out, jobs=1)
    assert promised_and_done(whole) == ["done", "done"]
    with (place / "chat.jsonl").open("a") as stream:
        stream.write('{"prompt": "99", "completion": "7"}\n')
    assert promised_and_done(whole) == ["runs again", "runs again"]
    (place / "q.jsonl").write_text('{"question": "Twice 2?", "answer": "4"}\n')
    assert promised_and_done(whole) == ["done", "runs again"]
    mapped = chat.replace("set =", 'map = {completion = "prompt", prompt = "completion"}\nset =')
    assert promised_and_done(mapped + asked.format("fish")) == ["runs again"] * 2
