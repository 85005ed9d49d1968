"""Other programs' JSON: what cannot be read is a sentence of the caller's, never a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from sprat.errors import CheckpointError
from sprat.files.json import load_json_object


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'{"a": 1', "no good: .*delimiter"),
        (b'{"a": "\xe9"}', "no good: .*utf-8"),
        (b"[" * 100_000, "no good: .*recursion"),
        (b"[1]", "not a JSON object"),
        (b"", "no good: "),
    ],
)
def test_what_is_no_object_is_named_with_its_file_and_what_to_do(tmp_path: Path, content: bytes, problem: str) -> None:
    (file := tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"^{problem}.*config\.json\); mend it"):
        load_json_object(file, CheckpointError, problem="no good", todo="mend it")


def test_of_a_key_that_stands_twice_the_last_one_counts_as_in_transformers(tmp_path: Path) -> None:
    (file := tmp_path / "config.json").write_text('{"a": 1, "a": 2}')
    assert load_json_object(file, CheckpointError, problem="", todo="") == {"a": 2}
    with pytest.raises(FileNotFoundError):
        load_json_object(tmp_path / "none.json", CheckpointError, problem="", todo="")
