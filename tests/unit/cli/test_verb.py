"""What every verb promises: one sentence for a fault, a documented exit code, one JSON object on request."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from sprat import errors
from sprat.cli import verb
from sprat.cli.main import VERBS, app
from sprat.errors import DataError, SpratError

ROOT = Path(__file__).resolve().parents[3]
CLASSES = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, SpratError)]


def run_verb(outcome: BaseException | verb.Result, *options: str) -> Result:
    """Run a command of one verb that raises or returns ``outcome``."""

    def station() -> verb.Result:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    tiny = typer.Typer(pretty_exceptions_enable=False)
    tiny.command()(verb.verb(station))
    return CliRunner().invoke(tiny, list(options))


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_a_fault_is_one_sentence_with_its_own_exit_code(kind: type[SpratError]) -> None:
    done = run_verb(kind("the soup is cold", where="pot", todo="heat it"))
    assert done.exit_code == kind.exit_code
    assert done.stderr == "sprat: the soup is cold (pot); heat it.\n" and done.stdout == ""


@pytest.mark.parametrize(
    "fault, code",
    [
        (KeyboardInterrupt(), 130),
        (MemoryError(), 9),
        (OSError(errno.ENOSPC, "No space left on device"), 9),
        (PermissionError(errno.EACCES, "Permission denied", "/nowhere"), 9),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 9),
        (OSError(errno.EFBIG, "File too large"), 9),
        (OSError("100000 requested and 8176 written"), 9),  # NumPy gives no number
        (shutil.Error([("a", "b", "[Errno 28] No space left on device: 'a' -> 'b'")]), 9),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141),
        (ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow"), 9),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1344324763648 bytes"), 9),
        (ZeroDivisionError("division by zero"), 70),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_other_faults_are_one_sentence_too(fault: BaseException, code: int) -> None:
    done = run_verb(fault)
    assert done.exit_code == code
    assert done.stderr.startswith("sprat: ") and done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_json_of_a_fault_says_type_message_and_code() -> None:
    done = run_verb(DataError("no text", where="folder"), "--json")
    assert json.loads(done.stdout) == {"error": {"type": "DataError", "message": "no text (folder).", "exit_code": 3}}


def test_debug_shows_where_a_fault_is() -> None:
    done = run_verb(DataError("no text"), "--debug")
    assert isinstance(done.exception, DataError)


def test_json_is_one_object_and_text_is_for_people() -> None:
    result = verb.Result({"answer": "ä", "path": Path("a/b")}, "the answer is ä")
    assert json.loads(run_verb(result, "--json").stdout) == {"answer": "ä", "path": "a/b"}
    assert run_verb(result).stdout == "the answer is ä\n"


def test_a_verb_may_find_fault_without_failing() -> None:
    done = run_verb(verb.Result({"ok": False}, "bad", 8), "--json")
    assert done.exit_code == 8 and json.loads(done.stdout) == {"ok": False}


def test_exit_codes_are_documented_as_they_are() -> None:
    table = (ROOT / "docs" / "exit-codes.md").read_text(encoding="utf-8")
    written = {name: int(code) for code, name in re.findall(r"^\| (\d+) \| `(\w+)` \|", table, re.MULTILINE)}
    assert written == {kind.__name__: kind.exit_code for kind in CLASSES}
    assert all(f"| {code} |" in table for code in (verb.INTERNAL_ERROR, verb.INTERRUPTED, verb.BROKEN_PIPE))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("words", ["--version", "--help", "verify nowhere --json"])
def test_a_full_disk_under_the_output_has_one_code(words: str) -> None:
    """Also where the verb's own fault (8) could not be told: the disk is what must be mended first, or the fault."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "sprat", *words.split()], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == (8 if "nowhere" in words else 9), done.stderr
    assert done.stderr.startswith("sprat: ") and done.stderr.count("\n") == 1


_TINY = """
import typer
from sprat.cli import verb
def station() -> verb.Result:
    return verb.Result({"a": 1}, "found" * 10_000)
tiny = typer.Typer()
tiny.command()(verb.verb(station))
tiny()
"""


def test_a_reader_who_leaves_is_no_fault_of_ours() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", _TINY], stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert done.returncode == 141 and done.stderr == "sprat: nobody reads the output any more.\n"


def test_help_names_every_verb_in_the_order_of_the_road() -> None:
    text = CliRunner().invoke(app, ["--help"]).stdout
    places = [text.index(f"\n  {name} ") for name, _, _ in VERBS]
    assert places == sorted(places) and len(VERBS) == 24


@pytest.mark.parametrize("name", [name for name, _, _ in VERBS])
def test_every_verb_explains_itself_and_speaks_json(name: str) -> None:
    done = CliRunner().invoke(app, [name, "--help"])
    assert done.exit_code == 0
    assert "--json" in done.stdout and "--debug" in done.stdout


def test_a_wrong_option_ends_like_a_wrong_recipe() -> None:
    done = CliRunner().invoke(app, ["verify", "--no-such-option"])
    assert done.exit_code == errors.ConfigError.exit_code and "--no-such-option" in done.stderr


def test_version_is_the_packages_own() -> None:
    import sprat

    assert CliRunner().invoke(app, ["--version"]).stdout == f"sprat {sprat.__version__}\n"
