"""A page of Perl's manual, and an apt-get and a dpkg-deb of our own: what tests of the corpus share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

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


def write_pages(folder: Path, pages: dict[str, str]) -> None:
    """Pages where perl-doc has them."""
    (place := folder / "usr" / "share" / "perl" / "5.36.0" / "pod").mkdir(parents=True)
    for name, page in pages.items():
        (place / f"{name}.pod").write_text(page)


def fake_tools(folder: Path, monkeypatch: pytest.MonkeyPatch, apt: str, dpkg: str = "") -> None:
    """Put an apt-get and a dpkg-deb of our own on the path, in place of all others but the shell."""
    folder.mkdir()
    for name, script in (("apt-get", apt), ("dpkg-deb", dpkg)):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    for name in ("sleep", "cp", "mkdir"):
        (folder / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(folder))
