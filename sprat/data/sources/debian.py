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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sprat.data.document import Document, count_and_bytes
from sprat.data.sources.source import OFFLINE_FAULT, SourceRequest, SourceText
from sprat.errors import DataError
from sprat.trust.stage_facts import TextSource

TIMEOUT_SECONDS = 20.0  # for each of the two commands


@dataclass(frozen=True)
class DebianPackage:
    """A Debian package with text in it.

    Attributes:
        name: package name.
        sha256: digest of the .deb that ``parse`` was written for.
        licence: terms of the text.
        parse: from the unpacked folder to its documents; raises DataError where it holds none.
    """

    name: str
    sha256: str
    licence: str
    parse: Callable[[Path], Iterable[Document]]

    def read(self, request: SourceRequest) -> SourceText:
        """All text of the package; the download has 20 s, and the unpacking too."""
        if request.offline:
            return SourceText((), lambda _: TextSource("debian packages", fault=OFFLINE_FAULT))
        for tool in ("apt-get", "dpkg-deb"):
            if shutil.which(tool) is None:
                return self._text(fault=f"this machine has no {tool}")
        with tempfile.TemporaryDirectory(prefix="sprat-deb-") as name:
            folder, file, digest = Path(name), "", ""
            try:
                _run_command(["apt-get", "-q", "download", self.name], folder)
                deb = next(iter(sorted(folder.glob("*.deb"))), None)
                if deb is None:
                    return self._text(fault="apt-get download left no package")
                file, digest = deb.name, hashlib.sha256(deb.read_bytes()).hexdigest()
                _run_command(["dpkg-deb", "-x", str(deb), str(folder / "tree")], folder)
                return self._text(tuple(self.parse(folder / "tree")), file=file, digest=digest)
            except (DataError, OSError) as error:
                return self._text(file=file, digest=digest, fault=str(error))

    def _text(
        self, documents: Sequence[Document] = (), file: str = "", digest: str = "", fault: str = ""
    ) -> SourceText:
        """``documents``, and the package's record, which counts all of them."""
        name, counts = f"debian {self.name}", count_and_bytes(documents)
        source = TextSource(name, self.licence, *counts, digest, fault, file, pinned=self.sha256)
        return SourceText(documents, lambda _: source)


def _run_command(command: list[str], folder: Path) -> None:
    """Run a command in ``folder``; past its time it is ended with all that it started.

    Raises:
        DataError: it failed or took too long.
    """
    env = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    null, pipe = subprocess.DEVNULL, subprocess.PIPE
    with subprocess.Popen(
        command, cwd=folder, env=env, stdin=null, stdout=null, stderr=pipe, start_new_session=True
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
        lines = [line for line in stderr.decode("utf-8", "replace").splitlines() if line.strip()]
        reason = next((line for line in lines if line.startswith("E:")), lines[-1] if lines else "no reason given")
        raise DataError(f"{command[0]} failed: {reason.removeprefix('E:').strip()}", where=command[-1])
