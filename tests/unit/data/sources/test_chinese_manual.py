"""Chinese prose is read out of pages of roff."""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sprat.data.sources import chinese_manual
from sprat.data.sources.source import SourceRequest
from sprat.errors import DataError

PAGE = r""".\" a comment
.TH LS 1 "用户命令"
.SH 描述
列出指定“文件”（默认为当前目录）的信息。如果没有指定
.BR \-cftuvSUX ,
则按字母排序\fB项目\fP。
.PP
This was never translated, so it is left out.
.TP
\fB\-a\fP
不要忽略以点号（“.”）起始的条目和文件
"""


def test_a_page_says_what_a_reader_sees(tmp_path: Path) -> None:
    text = chinese_manual.roff_to_text(PAGE)
    assert text.split("\n\n") == [
        "列出指定“文件”（默认为当前目录）的信息。如果没有指定 -cftuvSUX ,则按字母排序项目。",
        "-a不要忽略以点号（“.”）起始的条目和文件\n",
    ]
    groff = shutil.which("groff")
    if groff is not None:
        told = subprocess.run([groff, "-man", "-Kutf8", "-Tutf8", "-P-c"], input=PAGE, capture_output=True, text=True)
        for words in ("列出指定“文件”", "-cftuvSUX", "不要忽略以点号"):
            assert words in re.sub(".\x08|\n", "", told.stdout) and words in text


def test_long_pages_are_documents_and_none_is_one_sentence(tmp_path: Path) -> None:
    folder = tmp_path / "usr" / "share" / "man" / "zh_CN" / "man1"
    with pytest.raises(DataError, match="no texts"):
        list(chinese_manual.read_pages(tmp_path))
    folder.mkdir(parents=True)
    (folder / "ls.1.gz").write_bytes(gzip.compress((PAGE * 9).encode()))
    (folder / "short.1.gz").write_bytes(gzip.compress(PAGE.encode()))
    [document] = chinese_manual.read_pages(tmp_path)
    assert (document.id, document.domain) == ("manpages-zh/ls.1", "chinese") and len(document.text) > 400


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("apt-get") is None, reason="needs apt-get")
def test_debians_package_holds_them() -> None:
    found = chinese_manual.PACKAGE.read(SourceRequest())
    if fault := found.record(()).fault:
        pytest.skip(fault)
    assert len(found.documents) > 300 and sum(each.size for each in found.documents) > 1_500_000
