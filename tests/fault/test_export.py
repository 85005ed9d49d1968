"""An export that is killed, or whose disk is full, leaves nothing that looks like a model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import sprat
from sprat.errors import MachineError
from sprat.formats.export import Form, export_model
from sprat.model import Transformer
from sprat.quant import quantize_model
from sprat.tokens import Tokenizer
from tests.unit.model.conftest import tiny_dense


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["12 + 13 = 25"], 460)


@pytest.fixture(scope="module")
def source(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "model"
    shape = {"vocab_size": 460, "hidden_size": 128, "intermediate_size": 128}
    sprat.save(Transformer.create(tiny_dense(**shape), 1), tokenizer, folder)
    return folder


KILLED = textwrap.dedent("""
    import sys, time
    from sprat.formats import export
    real = export.write_manifest
    def slow(*rest):
        print("written", flush=True)
        time.sleep(60)
    export.write_manifest = slow
    export.export_model(sys.argv[1], sys.argv[2], export.Form("fp8"))
""")


def test_a_kill_leaves_no_folder_that_looks_whole(source: Path, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, source, tmp_path / "out"], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"written\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    [left] = tmp_path.iterdir()
    assert left.name == f".out.tmp-{process.pid}"
    deadline = time.monotonic() + 5
    while Path(f"/proc/{process.pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    export_model(source, tmp_path / "out", Form("fp8"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("form", [Form(), Form("fp8"), Form("pack-quantized"), Form("gguf", "f32", "superbpe")])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(form: Form, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = Transformer.create(tiny_dense(vocab_size=460, hidden_size=128, intermediate_size=128), 1)
    sprat.save(quantize_model(model) if form.format == "pack-quantized" else model, tokenizer, tmp_path / "model")
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60k", "tmpfs", place], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("only root may mount a small disk")
    try:
        with pytest.raises(MachineError, match="the disk is full"):
            export_model(tmp_path / "model", place / "out", form)
        assert list(place.iterdir()) == []
    finally:
        subprocess.run(["umount", place], check=True)
