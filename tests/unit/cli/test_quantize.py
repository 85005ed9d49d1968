"""``sprat quantize MODEL``: any model in INT4, fitted to the user's text, or one sentence that says why not."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import sprat
from sprat import quant
from sprat.cli.main import app
from sprat.cli.quantize import _summary
from sprat.config import QuantConfig
from sprat.config.model import LoRAConfig
from sprat.formats import quantized
from sprat.formats.peft import save_peft
from sprat.model.lora import add_lora
from sprat.tokens import Tokenizer


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder of text, enough for a few rows."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(20):
        (folder / f"{number}.txt").write_text(f"State the sum of {number} + 4 + 5. one two three " * 40)
    return folder


def test_a_model_is_fitted_to_the_users_text_and_loads_again(model_folder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    done = CliRunner().invoke(
        app,
        [
            "quantize",
            str(model_folder),
            "--calibrate",
            str(text),
            "--out",
            str(out),
            "--set",
            "group=64",
            "--json",
        ],
    )
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["rounding"] == "gptq" and told["calibration_tokens"] >= 2048
    assert told["size_bytes"] * 4 < told["dense_bytes"]
    model, tokenizer = sprat.load(out)
    assert quant.quant_config_of(model) == QuantConfig(rounding="gptq", group=64)
    assert tokenizer.vocab_size <= model.config.vocab_size


def test_without_text_it_rounds_to_the_nearest(model_folder: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["quantize", str(model_folder), "--out", str(tmp_path / "small")])
    assert done.exit_code == 0 and "times smaller" in done.stdout, done.stderr
    assert quant.quant_config_of(quantized.load(tmp_path / "small")) == QuantConfig()


@pytest.mark.parametrize(
    ("rounding", "options", "made"),
    [
        ("nearest", [], "nearest"),
        ("gptq", ["--calibrate", "TEXT"], "gptq"),
        ("nearest", ["--calibrate", "TEXT"], "gptq"),  # an option of the command says more than the file
        ("gptq", ["--set", "rounding=nearest"], "nearest"),
        ("gptq", ["--method", "nearest"], "nearest"),
        ("nearest", ["--method", "gptq", "--calibrate", "TEXT"], "gptq"),
        ("gptq", [], ""),
    ],
)
def test_the_rounding_of_a_recipe_file_holds(
    model_folder: Path, text: Path, tmp_path: Path, rounding: str, options: list[str], made: str
) -> None:
    recipe, out = tmp_path / "mine.toml", tmp_path / "small"
    recipe.write_text(f'rounding = "{rounding}"\ngroup = 128\n')
    more = [str(text) if word == "TEXT" else word for word in options]
    done = CliRunner().invoke(app, ["quantize", str(model_folder), "--out", str(out), "--recipe", str(recipe), *more])
    if made:
        assert done.exit_code == 0, done.stderr
        assert quant.quant_config_of(quantized.load(out)) == QuantConfig(rounding=made, group=128)
    else:
        assert done.exit_code == 2 and not out.exists()
        assert all(word in done.stderr for word in ("GPTQ needs text", "--calibrate", "nearest"))


def test_a_recipe_whose_scales_read_text_is_not_made_gptq(model_folder: Path, text: Path, tmp_path: Path) -> None:
    recipe, out = tmp_path / "mine.toml", tmp_path / "small"
    recipe.write_text('rounding = "nearest"\nclip = "mse"\n')
    words = ["quantize", str(model_folder), "--out", str(out), "--recipe", str(recipe), "--calibrate", str(text)]
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["rounding"] == "nearest"
    assert {packed.rounding for packed in quant.quantized_weights(sprat.load(out)[0]).values()} == {"nearest"}


def test_awq_on_the_users_text_writes_down_what_it_did(model_folder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    words = ["quantize", str(model_folder), "--method", "awq", "--calibrate", str(text), "--out", str(out)]
    done = CliRunner().invoke(app, [*words, "--set", "symmetric=false", "--set", "expert_tokens=99999", "--json"])
    assert done.exit_code == 0, done.stderr
    told, kept = json.loads(done.stdout), json.loads((out / "quantize.json").read_text())
    assert told["awq"] and told["clip"] == "mse" and kept["config"]["awq"] and not kept["config"]["symmetric"]
    assert told["few_tokens"]["count"] == kept["facts"]["few_tokens"]["count"] > 0  # none can see so many
    assert told["expert_tokens"]["min"] <= told["expert_tokens"]["median"] < 99999
    assert "experts saw too few tokens" in done.stderr
    codes = quant.quantized_weights(sprat.load(out)[0])
    assert all((packed.minimums is not None) == (packed.bits == 4) for packed in codes.values())


def test_scales_are_tuned_on_conversations(model_folder: Path, tmp_path: Path) -> None:
    """What came of it is told and kept, and the model loads again with matrices of four and of eight bits."""
    chats, out = tmp_path / "chats.jsonl", tmp_path / "small"
    rows = [json.dumps({"prompt": f"{number} + 4?", "completion": str(number + 4)}) for number in range(200)]
    chats.write_text("\n".join(rows) + "\n")
    words = ["quantize", str(model_folder), "--calibrate", str(chats), "--out", str(out), "--set", "tune_steps=3"]
    done = CliRunner().invoke(app, [*words, "--set", 'eight_bits=["down_proj"]', "--json"])
    assert done.exit_code == 0, done.stderr
    told, kept = json.loads(done.stdout), json.loads((out / "quantize.json").read_text())
    assert told["rounding"] == "gptq" and told["tuned"] == kept["facts"]["tuned"] and told["tuned"]["steps"] == 3
    assert told["tuned"]["kl_before"] > 0
    packed = quant.quantized_weights(sprat.load(out)[0])
    downs = ("down_proj", "w_down")  # of a feed-forward, and of experts
    assert all(
        (each.bits == 8) == any(part in name for part in downs) for name, each in packed.items() if "layers" in name
    )


def test_what_cannot_be_squeezed_is_one_sentence_and_nothing_is_written(
    model_folder: Path, text: Path, tmp_path: Path
) -> None:
    small, short, out = tmp_path / "small", tmp_path / "short.txt", tmp_path / "out"
    short.write_text("one two three")
    assert CliRunner().invoke(app, ["quantize", str(model_folder), "--out", str(small)]).exit_code == 0
    faults = {
        ("--out",): [str(model_folder)],
        ("text", "--calibrate"): ["--calibrate", str(text)],
        ("too few",): [str(model_folder), "--calibrate", str(short), "--out", str(out)],
        ("nowhere",): [str(model_folder), "--calibrate", str(tmp_path / "nowhere"), "--out", str(out)],
        ("quantised already", "--dequantize"): [str(small), "--out", str(out)],
        ("write group=64",): [str(model_folder), "--out", str(out), "--set", "quant.group=64"],
        ("'grup'", "'group'"): [str(model_folder), "--out", str(out), "--set", "grup=64"],
        ("tune_steps needs text",): [*(str(model_folder), "--out", str(out)), *("--set", "tune_steps=3")],
        ("zero_points=false",): [
            *(str(model_folder), "--calibrate", str(text), "--out", str(out), "--set", "tune_steps=3"),
            *("--set", "symmetric=false", "--set", "zero_points=true"),
        ],
        ("'down_prj'",): [str(model_folder), "--out", str(out), "--set", 'eight_bits=["down_prj"]'],
        ("bits=4",): [str(model_folder), "--out", str(out), "--set", "symmetric=false", "--set", "bits=8"],
        ("'best'", "awq"): [str(model_folder), "--out", str(out), "--method", "best"],
        ("AWQ needs text",): [str(model_folder), "--out", str(out), "--method", "awq"],
        ("none was named",): ["--method", "awq"],
        ("tokens of text reach expert", "mlp.experts"): [
            str(model_folder),
            "--calibrate",
            str(text),
            "--out",
            str(out),
            "--set",
            "few_tokens=refuse",
            "--set",
            "expert_tokens=99999",
        ],
        ("damping", "raise it"): [
            *(str(model_folder), "--calibrate", str(text), "--out", str(out)),
            *("--set", "damping=1e-14", "--set", "calibration_tokens=512", "--set", "few_tokens=all"),
        ],
        ("overwrite",): [str(model_folder), "--out", str(model_folder)],
    }
    for words, options in faults.items():
        done = CliRunner().invoke(app, ["quantize", *options])
        assert done.exit_code in (2, 3, 4) and len(done.stderr.splitlines()) == 1, done.stderr
        assert all(word in done.stderr for word in words), done.stderr
    assert not out.exists()


@pytest.mark.parametrize(
    ("tuned", "advice", "said"),
    [
        ((0.5, 0.25, True), "", "; KL to the original 0.5000 before tuning, 0.2500 after"),
        ((0.5, 0.75, False), "lower tune_lr", "; KL to the original 0.5000"),  # 0.75 is of what was thrown away
        ((0.5, 0.5, False), "raise tune_steps or tune_lr", "; KL to the original 0.5000"),  # no scale moved
    ],
)
def test_the_figure_is_that_of_the_model_that_is_written(
    tuned: tuple[float, float, bool], advice: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {"size_bytes": 10**6, "dense_bytes": 10**7}
    line = _summary(Path("small"), {**facts, "tuned": dict(zip(("kl_before", "kl_after", "kept"), tuned, strict=True))})
    assert line.endswith(said)
    assert (advice in capsys.readouterr().err) and line.startswith("small: 1.0 MB")


@pytest.mark.parametrize("verb", ["quantize", "merge", "export --hf", "export --gguf"])
def test_a_place_where_nothing_can_be_written_is_refused_before_the_work(
    verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not after it: there is no model at all here, and nobody comes to look for it."""
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    folders = {"file/out": "Not a directory", "n" * 255: "File name too long", "n" * 250: "File name too long"}
    folders |= {} if "gguf" in verb else {"nowhere": "something is there already"}
    words = [*verb.split()[:1], "no-model", *(["no-adapter"] if verb == "merge" else []), *verb.split()[1:]]
    for name, said in folders.items():
        out = tmp_path / name
        done = CliRunner().invoke(app, [*words, *([] if verb.startswith("export") else ["--out"]), str(out)])
        assert done.exit_code in (2, 9) and said in done.stderr, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "nowhere"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_model_is_never_written_over(model_folder: Path, text: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    shutil.copytree(model_folder, precious)
    before = contents(precious)
    words = ["quantize", str(model_folder), "--out", str(precious), "--calibrate", str(text)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2 and "something is there already" in done.stderr
    assert contents(precious) == before


@pytest.mark.parametrize("verb", ["quantize", "merge"])
def test_what_dies_while_it_writes_leaves_no_folder(
    verb: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are written, the tokenizer is not."""
    model, _ = sprat.load(model_folder)
    add_lora(model, LoRAConfig(rank=2))
    save_peft(model, tmp_path / "adapter")

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Tokenizer, "save", die)
    words = [verb, str(model_folder), *([str(tmp_path / "adapter")] if verb == "merge" else [])]
    stopped = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out")])
    assert stopped.exit_code == 130 and "begin anew: nothing is kept" in stopped.stderr  # it has no checkpoints
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    monkeypatch.undo()
    done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.stderr


@pytest.mark.slow
def test_the_page_on_quantizing_is_true(
    model_folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commands as they stand there, with a smaller model of that name."""
    page = (Path(__file__).resolve().parents[3] / "docs" / "quant.md").read_text(encoding="utf-8")
    [block] = re.findall(r"<!-- run -->\n```bash\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, "mine")
    text.rename("texts")
    Path("held-out.txt").write_text("State the sum of 3 + 4 + 5 = 12. " * 20)
    Path("held-out").mkdir()
    for number in range(3):
        (Path("held-out") / f"{number}.txt").write_text(f"State the sum of {number} + 4 + 5. " * 20)
    chats = [json.dumps({"prompt": f"{number} + 4?", "completion": str(number + 4)}) for number in range(60)]
    Path("chats.jsonl").write_text("\n".join(chats) + "\n")
    Path("questions.jsonl").write_text('{"question": "3 + 4?", "answer": 7}\n{"question": "1 + 1?", "answer": 2}\n')
    for line in block.splitlines():
        done = CliRunner().invoke(app, shlex.split(line)[1:])
        assert done.exit_code == 0, (line, done.stderr)
    assert (Path("certificate") / "certificate.html").is_file()
    assert all(quant.quantized_weights(sprat.load(name)[0]) for name in ("small", "scaled", "turned", "tuned"))
