"""Perl's manual is read as Perl reads it, and Debian's package holds it."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from sprat.data.sources import perl_manual
from sprat.data.sources.source import SourceRequest
from sprat.data.text_split import is_held_out_source
from tests.unit.data.packages import PAGE


def test_prose_of_a_manual_page_is_what_perl_reads_in_it() -> None:
    """``Pod::Simple::TextContent`` of Perl itself is the oracle, but for verbatim paragraphs, which are no prose."""
    found = perl_manual.pod_to_text(PAGE)
    assert found.split("\n\n")[:3] == ["NAME", "perlfake - a page", "DESCRIPTION"]
    assert "code" not in found and "no prose" not in found
    perl = shutil.which("perl")
    if perl is None or subprocess.run([perl, "-MPod::Simple::TextContent", "-e1"], check=False).returncode:
        pytest.skip("needs Perl with Pod::Simple")
    script = "Pod::Simple::TextContent->filter(\\*STDIN)"
    plain = PAGE.replace('    my $code = "is left out";\n\n', "")
    told = subprocess.run(
        [perl, "-CSD", "-MPod::Simple::TextContent", "-e", script],
        input=plain,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.split() == told.stdout.split()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("apt-get") is None, reason="needs apt-get")
def test_debians_package_holds_perls_manual() -> None:
    found = perl_manual.PACKAGE.read(SourceRequest())
    if fault := found.record(()).fault:
        pytest.skip(fault)
    sources = {one.source for one in found.documents}
    assert {"perl/perlretut", "perl/perlfaq4"} <= sources and len(sources) > 100
    assert sum(one.size for one in found.documents) > 3_500_000
    assert sum(is_held_out_source(one.source) for one in found.documents) > 20
