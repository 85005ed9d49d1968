"""A server in a file: its settings, its models, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sprat.errors import ServeError
from sprat.serve.server_file import ModelSource, read_server_file

FILE = """
model = "runs/one"
served_model_name = "one"
served_model_aliases = ["uno"]
max_num_seqs = 4

[adapters]
mine = "runs/mine"

[[models]]
model = "runs/two"
"""


def test_settings_and_models_are_read(tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_text(FILE)
    settings, sources = read_server_file(tmp_path / "server.toml")
    assert settings == {"max_num_seqs": 4}
    one = ModelSource(Path("runs/one"), ("one", "uno"), {"mine": Path("runs/mine")})
    assert sources == [one, ModelSource(Path("runs/two"))]
    assert sources[1].served_names == ("two",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model = 3", "no folder"),
        ("a b", "cannot read"),
        ("models = 3", "list of tables"),
        ('[[models]]\nmodel = "x"\ncolour = 1', "colour"),
    ],
)
def test_what_is_wrong_is_one_sentence_that_names_the_file(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "server.toml").write_text(text)
    with pytest.raises(ServeError, match=words) as fault:
        read_server_file(tmp_path / "server.toml")
    assert str(tmp_path) in str(fault.value)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="no such file"):
        read_server_file(tmp_path / "none.toml")
