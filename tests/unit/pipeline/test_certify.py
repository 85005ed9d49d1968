"""A squeezed model is certified against its original: nothing lost is exactly nothing, and what is broken is found."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch

import sprat
from sprat.config.quant import QuantizeConfig
from sprat.errors import CheckpointError, DataError
from sprat.model import Transformer
from sprat.pipeline.certify import CertifySettings, certify
from sprat.pipeline.recipe import load_recipe
from sprat.post.quantize import quantize_model as quantize_folder
from sprat.quant import quantize_model
from sprat.tokens import Tokenizer
from tests.gguf_files import write
from tests.lucky import lucky_shape, lucky_tokenizer
from tests.unit.eval.conftest import TEXT, learn_text

RECIPE = load_recipe("tiny")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``original``, ``text.jsonl`` and ``anything.jsonl``, a task of which every answer is right."""
    folder = tmp_path_factory.mktemp("certify")
    tokenizer = lucky_tokenizer()
    sprat.save(learn_text(tokenizer, lucky_shape(tokenizer)), tokenizer, folder / "original")
    pieces = [TEXT[start : start + 60].decode() for start in range(0, 900, 30)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": piece}) + "\n" for piece in pieces))
    rows = [{"question": f"{number} test", "answer": "(?s).*", "judge": "regex"} for number in range(200)]
    (folder / "anything.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(place: Path, **changes: object) -> CertifySettings:
    asked = {"text": place / "text.jsonl", "documents": 30, "window": 32, "max_loss": 0.02, "prompts": 4}
    return CertifySettings(**{**asked, "continuation": 24, "speed": False, **changes})  # type: ignore[arg-type]


def saved(place: Path, name: str, model: Transformer, tokenizer: Tokenizer) -> Path:
    sprat.save(model, tokenizer, place / name)
    return place / name


def test_a_model_against_itself_lost_exactly_nothing(place: Path) -> None:
    steps: list[tuple[int, int]] = []
    asked = settings(place, tasks=(str(place / "anything.jsonl"),), max_tokens=1, speed=True)
    found = certify(place / "original", place / "original", asked, RECIPE, on_progress=lambda *step: steps.append(step))
    [text], [task], [flips], said = found.texts, found.tasks, found.routing, found.continuations
    for estimate in (text.loss, text.difference, text.kl_mean, text.kl_p99):
        assert estimate.value == estimate.low == estimate.high == 0
    assert text.kl_max == 0 and text.same_top.value == 1 and flips.sets.value == flips.slots.value == 0
    assert said is not None and said.diverged == 0 and said.loops_difference.value == 0
    assert (task.answers.first, task.answers.difference) == (1.0, 0.0) and task.loss is not None
    assert task.loss.value == 0 and task.loss.high == pytest.approx(3.8415 / 203.8415, rel=1e-4)
    assert found.failed == [] and found.model == found.original and found.model.bytes > 100_000
    assert len(found.speeds) == 3 and found.machine.processor
    assert steps[-1][0] == steps[-1][1] == len(steps)
    few = certify(
        place / "original", place / "original", settings(place, tasks=asked.tasks, max_tokens=1, count=50), RECIPE
    )
    assert few.failed == ["task anything"]  # 50 problems cannot prove 2 %


def test_a_zeroed_matrix_fails_and_int8_holds(place: Path) -> None:
    model, tokenizer = sprat.load(place / "original")
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.layers[0].self_attn.o_proj.weight.zero_()  # type: ignore[union-attr]
    found = certify(saved(place, "broken", broken, tokenizer), place / "original", settings(place), RECIPE)
    assert found.failed == ["text text.jsonl"] and found.texts[0].loss.low > 0.02
    squeezed = quantize_model(model, RECIPE.quant.replace(bits=8, rounding="nearest"))
    found = certify(saved(place, "small", squeezed, tokenizer), place / "original", settings(place), RECIPE)
    assert found.failed == [] and found.texts[0].kl_mean.value > 0 and found.model.bytes < found.original.bytes / 2


def test_two_swapped_experts_fail(place: Path) -> None:
    model, tokenizer = sprat.load(place / "original")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".experts.w_" in name:
                weight.copy_(weight[[1, 0, *range(2, len(weight))]])
    found = certify(saved(place, "swapped", model, tokenizer), place / "original", settings(place), RECIPE)
    assert found.failed == ["text text.jsonl"]


def test_the_same_ids_in_another_file_are_the_same_tokenizer(place: Path, tmp_path: Path) -> None:
    """As in a GGUF file, which names pieces and merges and no tokenizer.json."""
    folder = tmp_path / "copy"
    shutil.copytree(place / "original", folder)
    table = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**table, "truncation": None, "version": "1.0"}, indent=7))
    assert sprat.load(folder)[1].digest != sprat.load(place / "original")[1].digest
    found = certify(folder, place / "original", settings(place), RECIPE)
    assert found.failed == [] and found.texts[0].kl_max == 0


def test_the_files_that_were_measured_are_those_that_are_named(place: Path, tmp_path: Path) -> None:
    """Of a run that exported a GGUF file it is that one; beside the one file of weights others are not read."""
    model, tokenizer = sprat.load(place / "original")
    artefact = tmp_path / "run" / "artefact"
    artefact.mkdir(parents=True)
    file = write(model, artefact / "model.gguf", kind=lambda _: "F32", split=False)
    folder = tmp_path / "copy"
    shutil.copytree(place / "original", folder)
    (folder / "consolidated.safetensors").write_bytes(b"not read")
    quick = settings(place)
    found = certify(folder, folder, quick, RECIPE)
    assert found.model.bytes == (folder / "model.safetensors").stat().st_size
    found = certify(tmp_path / "run", file, quick, RECIPE)
    assert found.model.bytes == file.stat().st_size and found.model.digest == found.original.digest


def test_a_certificate_against_another_model_says_so(place: Path, tmp_path: Path) -> None:
    """As one whose tokenizer is the same: the figures are of two models, and not of what rounding took."""
    small, other = tmp_path / "small", tmp_path / "other"
    quantize_folder(place / "original", small, QuantizeConfig(bits=8), None)
    shutil.copytree(place / "original", other)
    model, tokenizer = sprat.load(other)
    with torch.no_grad():
        model.norm.weight.mul_(1.01)
    sprat.save(model, tokenizer, other)
    assert certify(small, place / "original", settings(place), RECIPE).missing == ()
    [said] = certify(small, other, settings(place), RECIPE).missing
    assert "made from other files" in said and str(small) in said and str(other) in said


def test_what_cannot_be_compared_is_one_sentence(place: Path, tmp_path: Path) -> None:
    other = Tokenizer.train(["7 train test and more words\n"] * 4, 300, numbers=10)
    stranger = saved(tmp_path, "stranger", Transformer.create(lucky_shape(other), 0), other)
    with pytest.raises(CheckpointError, match="different tokenizers"):
        certify(stranger, place / "original", settings(place), RECIPE)
    with pytest.raises(DataError, match="neither a file of yours nor a task of the recipe"):
        certify(place / "original", place / "original", settings(place, tasks=("nothing",)), RECIPE)
