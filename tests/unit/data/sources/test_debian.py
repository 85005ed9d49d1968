"""A package that cannot be had is a fault that sources.json tells, never an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from sprat.data.sources import debian, perl_manual
from sprat.data.sources.source import SourceRequest
from tests.unit.data.packages import fake_tools


@pytest.mark.parametrize(
    ("apt", "said"),
    [
        ("echo 'E: Unable to locate package x' >&2; exit 100", "Unable to locate package x"),
        ("sleep 60", "took more than 0.5 s"),
        ("exit 0", "left no package"),
        ("echo x > a.deb", "no texts"),
        (None, "no apt-get"),
    ],
)
def test_a_package_that_cannot_be_had_is_told_not_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apt: str | None, said: str
) -> None:
    monkeypatch.setattr(debian, "TIMEOUT_SECONDS", 0.5)
    if apt is None:
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        fake_tools(tmp_path / "bin", monkeypatch, apt, 'mkdir -p "$3"')
    found = perl_manual.PACKAGE.read(SourceRequest())
    assert said in found.record(()).fault
    assert found.documents == ()
