"""Texts out of Debian packages: fetched by name at run time, unpacked in a temporary folder.

``apt-get download`` checks a package against the signed lists of the machine and needs no rights;
``dpkg-deb -x`` only unpacks, so that no script of the package runs. Every package has the SHA-256 that
we read it with; another version is used all the same, and both digests are recorded.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from sprat.data import pod
from sprat.data.document import Document
from sprat.errors import DataError

TIMEOUT_SECONDS = 20.0  # for each of the two commands
PERL_LICENCE = "Artistic or GPL-1+"
PERL_LEFT_OUT = {"perltoc", "perlhist", "perlcn", "perljp", "perlko", "perltw"}  # lists, and what is not in English


@dataclass(frozen=True)
class DebianPackage:
    """A Debian package with text in it.

    Attributes:
        name: package name.
        sha256: digest of the .deb that the reader was written for.
        licence: terms of the text.
        read: from the unpacked folder to its documents.
    """

    name: str
    sha256: str
    licence: str
    read: Callable[[Path], Iterator[Document]]


@dataclass(frozen=True)
class FetchedPackage:
    """What came of one package: its documents, or why there are none."""

    package: DebianPackage
    file: str
    sha256: str
    documents: tuple[Document, ...]
    fault: str


def perl_pages(folder: Path) -> Iterator[Document]:
    """Perl's manual in perl-doc: tutorials, questions and answers, reference; one document a section."""
    pages = sorted(folder.rglob("usr/share/perl/*/pod/*.pod"))
    if not pages:
        raise DataError("the package has no texts", where="usr/share/perl", todo="report this version")
    for page in pages:
        if "delta" in page.stem or page.stem in PERL_LEFT_OUT:
            continue
        source = f"perl/{page.stem}"
        sections = page.read_text(encoding="utf-8", errors="replace").split("\n=head1 ")
        for number, section in enumerate(sections):
            text = pod.prose(f"=head1 {section}" if number else section)
            if len(text) > 200:  # less is a name, or a list of other pages
                yield Document(f"{source}#{number}", text, source, PERL_LICENCE, "prose")


PERL = DebianPackage(
    name="perl-doc",
    sha256="f4269cff4576d6f02a6756df842988e58451c7e945b08517dd235531b24e48f8",
    licence=PERL_LICENCE,
    read=perl_pages,
)
PACKAGES = (PERL,)


def fetch_packages(packages: Sequence[DebianPackage] = PACKAGES) -> list[FetchedPackage]:
    """Fetch and read ``packages``, all at once; each has 20 s for the download and 20 s to unpack."""
    with ThreadPoolExecutor(max_workers=max(1, len(packages))) as pool:
        return list(pool.map(_fetch_package, packages))


def _fetch_package(package: DebianPackage) -> FetchedPackage:
    """One package; whatever goes wrong is told in ``fault``."""
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            return FetchedPackage(package, "", "", (), f"this machine has no {tool}")
    with tempfile.TemporaryDirectory(prefix="sprat-deb-") as name:
        folder = Path(name)
        file, digest = "", ""
        try:
            _run_command(["apt-get", "-q", "download", package.name], folder)
            deb = next(iter(sorted(folder.glob("*.deb"))), None)
            if deb is None:
                return FetchedPackage(package, "", "", (), "apt-get download left no package")
            file, digest = deb.name, hashlib.sha256(deb.read_bytes()).hexdigest()
            _run_command(["dpkg-deb", "-x", str(deb), str(folder / "tree")], folder)
            return FetchedPackage(package, file, digest, tuple(package.read(folder / "tree")), "")
        except (DataError, OSError) as error:
            return FetchedPackage(package, file, digest, (), str(error))


def _run_command(command: list[str], folder: Path) -> None:
    """Run a command in ``folder``; past its time it is ended with all that it started.

    Raises:
        DataError: it failed or took too long.
    """
    settings = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    with subprocess.Popen(
        command,
        cwd=folder,
        env=settings,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        try:
            _, stderr = process.communicate(timeout=TIMEOUT_SECONDS)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                what = f"{command[0]} took more than {TIMEOUT_SECONDS:g} s"
                raise DataError(what, where=command[-1], todo="try again later") from None
            raise
    if process.returncode:
        reasons = [line for line in stderr.decode("utf-8", "replace").splitlines() if line.strip()]
        reason = next(
            (line for line in reasons if line.startswith("E:")), reasons[-1] if reasons else "no reason given"
        )
        raise DataError(f"{command[0]} failed: {reason.removeprefix('E:').strip()}", where=command[-1])
