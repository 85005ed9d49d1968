"""Importing Sprat is cheap, and heavy packages load only for those who use them."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from sprat.formats.load import save
from sprat.model import Transformer
from tests.lucky import lucky_shape, lucky_tokenizer

FACE = "import sys, sprat; sprat.Engine, sprat.Sampling, sprat.load, sprat.save; print(*sys.modules)"


def run_python(root: Path, code: str, *words: str) -> str:
    """Standard output of ``code`` in a new interpreter."""
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def measured(command: list[str], root: Path, enough: float, tries: int = 3) -> tuple[float, str]:
    """CPU seconds of the quickest of a few runs, and what the last one said.

    Not wall seconds, because other tests share the cores.
    """
    best = float("inf")
    for _ in range(tries):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True, timeout=120)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        if best <= enough:
            break
    return best, done.stdout


def cpu_seconds(command: list[str], root: Path, enough: float, tries: int = 3) -> float:
    """CPU seconds of the quickest of a few runs."""
    return measured(command, root, enough, tries)[0]


def test_help_answers_at_once(root: Path) -> None:
    assert cpu_seconds([sys.executable, "-m", "sprat", "--help"], root, enough=0.5) <= 0.5


def test_import_sprat_is_quick(root: Path) -> None:
    assert cpu_seconds([sys.executable, "-c", "import sprat"], root, enough=0.2) <= 2.5


@pytest.fixture(scope="module")
def face(root: Path) -> tuple[float, float, set[str]]:
    """CPU seconds of torch and of the public face, and the modules that the face loads."""
    torch = cpu_seconds([sys.executable, "-c", "import torch"], root, enough=0.0, tries=1)
    seconds, modules = measured([sys.executable, "-c", FACE], root, enough=1.5 * torch)
    return torch, seconds, set(modules.split())


def test_the_public_face_costs_little_more_than_torch(face: tuple[float, float, set[str]]) -> None:
    torch, seconds, _ = face
    assert seconds <= 2 * torch


def test_the_public_face_leaves_heavy_packages_alone(face: tuple[float, float, set[str]]) -> None:
    heavy = {"transformers", "reasoning_gym", "matplotlib", "fastapi", "uvicorn", "pyarrow", "huggingface_hub"}
    assert "torch" in face[2] and not face[2] & heavy


def test_help_never_imports_torch(root: Path) -> None:
    code = "import sys, sprat.cli.main; print('torch' in sys.modules, 'pydantic' in sys.modules)"
    assert run_python(root, code).split() == ["False", "False"]


def test_scores_and_the_report_take_no_torch(root: Path) -> None:
    assert run_python(root, "import sys, sprat.eval.score, sprat.report; print('torch' in sys.modules)") == "False\n"


def test_the_planner_takes_no_torch(root: Path) -> None:
    code = "import importlib, pkgutil, sys, sprat.plan as p\n"
    code += "names = [m.name for m in pkgutil.walk_packages(p.__path__, 'sprat.plan.')]\n"
    code += "[importlib.import_module(name) for name in names]; print(len(names) > 0, 'torch' in sys.modules)"
    assert run_python(root, code) == "True False\n"


def test_a_tokenizer_takes_no_torch(root: Path, tmp_path: Path) -> None:
    """The process that answers HTTP loads one, and torch would cost it a second of its start and 180 MB."""
    from tests.gguf_files import write

    tokenizer = lucky_tokenizer()
    model = Transformer.create(lucky_shape(tokenizer), 0)
    save(model, tokenizer, tmp_path / "run" / "artefact")
    write(model, tmp_path / "model.gguf", kind=lambda _: "F32")
    code = """
import sys
from sprat.formats.load import find_model, load_tokenizer
for path in sys.argv[1:]:
    print(load_tokenizer(path).encode("what is 3?"), find_model(path), "torch" in sys.modules, sep="|")
"""
    found = [tmp_path / "run" / "artefact", tmp_path / "model.gguf"]
    said = run_python(root, code, str(tmp_path / "run"), str(found[1])).splitlines()
    assert [line.split("|")[1:] for line in said] == [[str(path), "False"] for path in found]
    assert said[0].split("|")[0] == str(tokenizer.encode("what is 3?"))


def test_a_training_step_leaves_the_compiler_of_torch_alone(root: Path) -> None:
    """Each process that trains would pay 1.1 s and 77 MB for it."""
    code = """
import sys, torch, sprat.config, sprat.train.optim as optim
model = torch.nn.Linear(4, 4)
optimizer = optim.build(model, sprat.config.OptimConfig())
for _ in range(2):
    optimizer.zero_grad()
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
print("torch._dynamo" in sys.modules)
"""
    assert run_python(root, code) == "False\n"


def test_a_wrong_name_says_what_there_is(root: Path) -> None:
    import sprat

    with pytest.raises(AttributeError, match="Engine, Sampling"):
        sprat.Engin  # noqa: B018
