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
    file = read_server_file(tmp_path / "server.toml")
    sources = file.sources(None, (), {})
    assert file.settings == {"max_num_seqs": 4}
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
        ("max_num_seq = 4", "max_num_seqs"),
        ("max_num_seqs = 0", "max_num_seqs"),
        ("prices = 3", "prices"),
        ("api_keys = 3", "api_keys"),
        ('allowed_host = ["https://chat.example"]', "without scheme"),
        ('api_key = "a"\napi_keys = ["b"]', "twice"),
        ("served_model_name = 3", "served_model_name"),
        ('adapters = "x"', "adapters"),
    ],
)
def test_what_is_wrong_is_one_sentence_that_names_the_file(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "server.toml").write_text(text)
    with pytest.raises(ServeError, match=words) as fault:
        read_server_file(tmp_path / "server.toml")
    assert str(tmp_path) in str(fault.value)


@pytest.mark.parametrize("key", ["api_key", "api_keys", "api-key"])
def test_one_key_without_a_list_is_one_key_and_not_its_letters(tmp_path: Path, key: str) -> None:
    (tmp_path / "server.toml").write_text(f'{key} = "secret"')
    assert read_server_file(tmp_path / "server.toml").settings["api_keys"] == ["secret"]


def test_the_names_of_options_are_known(tmp_path: Path) -> None:
    text = 'shutdown_timeout = 3\nallowed-host = "chat.example"\nturns = 2\nname = ["a", "b"]\n[adapter]\nx = "y"'
    (tmp_path / "server.toml").write_text(text)
    file = read_server_file(tmp_path / "server.toml")
    expected = {"shutdown_timeout_seconds": 3, "allowed_hosts": ["chat.example"], "max_history_turns": 2}
    assert file.settings == expected
    assert file.sources(Path("m"), (), {}) == [ModelSource(Path("m"), ("a", "b"), {"x": Path("y")})]


def test_the_command_line_counts_more_and_loses_no_model(tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_text(FILE)
    file, two = read_server_file(tmp_path / "server.toml"), ModelSource(Path("runs/two"))
    assert file.sources(Path("m"), (), {}) == [ModelSource(Path("m")), two]  # the adapters are of another base
    renamed = ModelSource(Path("runs/one"), ("new",), {"mine": Path("runs/mine")})
    assert file.sources(None, ("new",), {}) == [renamed, two]
    (tmp_path / "server.toml").write_text('[[models]]\nmodel = "runs/two"')
    assert read_server_file(tmp_path / "server.toml").sources(Path("m"), (), {}) == [ModelSource(Path("m")), two]


def test_a_name_of_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_text('served_model_name = "a"\n[[models]]\nmodel = "runs/two"')
    with pytest.raises(ServeError, match="of no model"):
        read_server_file(tmp_path / "server.toml").sources(None, (), {})


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ServeError, match="no such file"):
        read_server_file(tmp_path / "none.toml")
