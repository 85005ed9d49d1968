"""The default corpus: real text on any machine, its terms recorded, and the reason when a part is missing."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sprat.data import corpus, debian, ingest, pod, pythonlib
from sprat.data.text_split import is_held_out_source
from sprat.errors import DataError

BUDGET = 60_000


PAGE = """=encoding utf8

=head1 NAME

perlfake - a page

=head1 DESCRIPTION

It was a B<dark> and C<< stormy->night >>; the rain fell in
torrents, as L<perlrain> and L<the sky|perlsky/Clouds> tell,
see L<perlrain/"How it falls">, L</Torrents>, L<https://example.org/>.

    my $code = "is left out";

=over 4

=item One

One E<lt> two, F<one.txt>X<index>.

=item Name

Its I<meaning, B<bold>>.

=back

=begin html

<p>no prose</p>

=end html

=cut

sub code { 1 }

=head2 Torrents

Words behind it.
"""


def test_prose_of_a_manual_page_is_what_perl_reads_in_it() -> None:
    """``Pod::Simple::TextContent`` of Perl itself is the oracle, but for verbatim paragraphs, which are no prose."""
    found = pod.prose(PAGE)
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


def write_pages(folder: Path, pages: dict[str, str]) -> None:
    """Pages where perl-doc has them."""
    (place := folder / "usr" / "share" / "perl" / "5.36.0" / "pod").mkdir(parents=True)
    for name, page in pages.items():
        (place / f"{name}.pod").write_text(page)


def test_docstrings_and_code_are_parted_and_both_keep_their_source(tmp_path: Path) -> None:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "no.py").write_text('"""Tests are left out of the corpus."""')
    (tmp_path / "broken.py").write_text("def (")
    text = '"""What this module is for."""\n\ndef f(a, *b, c=1):\n    """Say what f does with a."""\n    return a\n'
    (tmp_path / "pkg" / "mod.py").write_text(text)
    found = list(pythonlib.documents(tmp_path))
    said, code = found
    assert said.text == "pkg.mod\n\nWhat this module is for.\n\nf(a, *b, c)\n\nSay what f does with a.\n"
    assert "Say what" not in code.text
    assert ast.parse(code.text).body[-1].name == "f"  # type: ignore[attr-defined]
    assert said.source == code.source == "python/pkg/mod.py"
    assert said.licence == "PSF-2.0"


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> corpus.Corpus:
    return corpus.default_corpus(tmp_path_factory.mktemp("corpus"), budget_bytes=BUDGET, offline=True)


def test_without_packages_the_python_library_serves_and_says_so(offline: corpus.Corpus) -> None:
    parts = offline.split()
    for side in (parts.train, parts.held_out):
        assert {one.domain for one in side} == {"prose", "docstring", "code"}
    size = sum(one.size for one in parts.train)
    assert 0.8 * BUDGET < size <= BUDGET
    assert offline.faults == ["offline: no package was fetched"]
    library = offline.sources[-1]
    assert library["licence"] == "PSF-2.0"
    assert library["bytes"] == sum(one.size for one in offline.read())
    assert len(library["digest"]) == 64


def test_the_same_machine_gives_the_same_corpus(offline: corpus.Corpus, tmp_path: Path) -> None:
    again = corpus.default_corpus(tmp_path, budget_bytes=BUDGET, offline=True)
    assert again.digest == offline.digest == hashlib.sha256(again.documents.read_bytes()).hexdigest()


def test_the_corpus_is_read_by_the_door_for_the_users_text(offline: corpus.Corpus) -> None:
    found = list(ingest.read_texts(offline.documents))
    assert [(one.text, one.source, one.domain) for one in found] == [
        (one.text, one.source, one.domain) for one in offline.read()
    ]


def fake_tools(folder: Path, monkeypatch: pytest.MonkeyPatch, apt: str, dpkg: str = "") -> None:
    """Put an apt-get and a dpkg-deb of our own on the path, in place of all others but the shell."""
    folder.mkdir()
    for name, script in (("apt-get", apt), ("dpkg-deb", dpkg)):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    for name in ("sleep", "cp", "mkdir"):
        (folder / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(folder))


NAMES = [f"perl{number}" for number in range(64)]
KEPT = [name for name in NAMES if is_held_out_source(f"perl/{name}")][0]
LEARNED = [name for name in NAMES if not is_held_out_source(f"perl/{name}")][0]


def test_pages_from_a_package_are_used_and_one_in_sixteen_is_held_out_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"perl5180delta": PAGE.replace("torrents", "changes"), "perltoc": PAGE.replace("torrents", "contents")}
    write_pages(tmp_path / "made", {LEARNED: PAGE, KEPT: PAGE.replace("dark", "light"), **changes})
    apt, dpkg = 'echo fake > "$3_1.deb"', f'mkdir -p "$3"; cp -r {tmp_path}/made "$3"'
    fake_tools(tmp_path / "bin", monkeypatch, apt, dpkg)
    found = corpus.default_corpus(tmp_path / "corpus", budget_bytes=BUDGET)
    assert found.faults == []
    package = found.sources[0]
    assert package["digest"] == hashlib.sha256(b"fake\n").hexdigest() != package["pinned"]
    assert package["licence"] == "Artistic or GPL-1+"
    parts = found.split()
    prose = {side: [one.text for one in texts if one.domain == "prose"] for side, texts in vars(parts).items()}
    assert len(prose["train"]) == len(prose["held_out"]) == 1
    assert prose["train"][0].startswith("DESCRIPTION\n\nIt was a dark and stormy->night; the rain fell in torrents, as")
    assert prose["train"][0].endswith("\n\nWords behind it.\n")
    assert "light" in prose["held_out"][0]
    # what was fetched once is kept, whatever becomes of the net
    monkeypatch.setenv("PATH", "")
    assert corpus.default_corpus(tmp_path / "corpus", budget_bytes=BUDGET).digest == found.digest


def test_what_was_made_offline_is_made_anew_for_who_goes_online(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pages(tmp_path / "made", {LEARNED: PAGE, KEPT: PAGE.replace("dark", "light")})
    fake_tools(tmp_path / "bin", monkeypatch, "exit 100", f'mkdir -p "$3"; cp -r {tmp_path}/made "$3"')
    alone = corpus.default_corpus(tmp_path / "corpus", budget_bytes=BUDGET, offline=True)
    tried = corpus.default_corpus(tmp_path / "corpus", budget_bytes=BUDGET)
    assert tried.digest == alone.digest
    assert tried.faults and not any("offline" in fault for fault in tried.faults)
    (tmp_path / "bin" / "apt-get").write_text('#!/bin/sh\necho fake > "$3_1.deb"\n')
    assert corpus.default_corpus(tmp_path / "corpus", budget_bytes=BUDGET).digest == alone.digest, (
        "tried once, then kept"
    )
    shutil.rmtree(tmp_path / "corpus")
    corpus.default_corpus(tmp_path / "corpus", budget_bytes=BUDGET, offline=True)
    fetched = corpus.default_corpus(tmp_path / "corpus", budget_bytes=BUDGET)
    assert fetched.faults == [] and f"perl/{LEARNED}" in {one.source for one in fetched.split().train}
    # and back: nothing is fetched, what is there stays
    monkeypatch.setenv("PATH", "")
    assert corpus.default_corpus(tmp_path / "corpus", budget_bytes=BUDGET, offline=True).digest == fetched.digest


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
    (found,) = debian.fetch_packages()
    assert said in found.fault
    assert found.documents == ()


def test_the_users_own_text_becomes_a_corpus_once(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}.txt").write_text(f"File {number} says something of its own.\n" * 4)
    made = corpus.text_corpus(folder, tmp_path / "corpus", budget_bytes=BUDGET)
    assert len(made.read()) == 30
    assert made.sources[0]["name"] == "mine"
    stamp = made.documents.stat().st_mtime_ns
    assert corpus.text_corpus(folder, tmp_path / "corpus", budget_bytes=BUDGET).digest == made.digest
    assert made.documents.stat().st_mtime_ns == stamp
    (folder / "31.txt").write_text("A new file with news.")
    assert corpus.text_corpus(folder, tmp_path / "corpus", budget_bytes=BUDGET).digest != made.digest
    small = corpus.text_corpus(folder, tmp_path / "small", budget_bytes=1000)
    assert sum(one.size for one in small.split().train) <= 1000


@pytest.mark.parametrize("name", [f"{number}.txt" for number in range(12)])
def test_of_two_files_the_large_one_is_learned_from_whatever_they_are_called(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / name).write_text("".join(f"Line {number} of the long book.\n" for number in range(9000)))
    (folder / "notes.txt").write_text("A few notes.\n" * 100)
    whole = sum(path.stat().st_size for path in folder.iterdir())
    for budget in (BUDGET, whole):
        made = corpus.text_corpus(folder, tmp_path / "corpus", budget_bytes=budget)
        again = corpus.text_corpus(folder, tmp_path / "corpus", budget_bytes=budget)  # as kept
        for parts in (made.split(), again.split()):
            assert {one.source for one in parts.train} == {name}
            assert {one.source for one in parts.held_out} == {"notes.txt"}
            assert sum(one.size for one in parts.train) > 0.9 * min(budget, whole)


def test_what_was_held_out_of_the_whole_text_is_held_out_of_its_sample(tmp_path: Path) -> None:
    """A budget makes the large sources small: by the sample's own sizes others would be held out."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text(f"{number} says so.\n" * (60 if number % 2 else 12_000))
    held = {
        budget: {one.source for one in corpus.text_corpus(folder, tmp_path / "c", budget_bytes=budget).split().held_out}
        for budget in (1000, 50_000, 10_000_000)
    }
    assert held[1000] == held[50_000] == held[10_000_000]


def test_a_file_whose_name_is_no_utf_8_stays_on_its_side(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in (b"caf\xe9.txt", b"na\xefve.txt"):
        (folder / os.fsdecode(name)).write_text(f"{name!r} says something of its own.\n" * 40)
    for _ in range(2):
        parts = corpus.text_corpus(folder, tmp_path / "corpus", budget_bytes=BUDGET).split()
        assert len(parts.train) == len(parts.held_out) == 1


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(DataError, match="5 bytes"):
        corpus.text_corpus(tmp_path, tmp_path / "corpus", budget_bytes=BUDGET)
    assert not (tmp_path / "corpus").exists()


def test_a_corpus_that_was_tampered_with_is_made_anew(offline: corpus.Corpus, tmp_path: Path) -> None:
    shutil.copytree(offline.documents.parent, tmp_path / "c")
    file = tmp_path / "c" / "documents.jsonl"
    file.write_text(file.read_text()[:-40])
    again = corpus.default_corpus(tmp_path / "c", budget_bytes=BUDGET, offline=True)
    assert again.digest == offline.digest
    facts = json.loads((tmp_path / "c" / "sources.json").read_text())
    assert facts["digest"] == offline.digest


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("apt-get") is None, reason="needs apt-get")
def test_debians_package_holds_perls_manual() -> None:
    (found,) = debian.fetch_packages()
    if found.fault:
        pytest.skip(found.fault)
    sources = {one.source for one in found.documents}
    assert {"perl/perlretut", "perl/perlfaq4"} <= sources and len(sources) > 100
    assert sum(one.size for one in found.documents) > 3_500_000
    assert sum(is_held_out_source(one.source) for one in found.documents) > 20
