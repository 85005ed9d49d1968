"""API keys, and the tenant that each one stands for.

A key is kept as its SHA-256 only, and no message or log holds either. What a key decides is the *tenant*: whose turn it
is in the engine, and the secret that takes part in the keys of cached blocks. Two keys therefore share nothing that was
computed, in memory or on disk, and the count of cached tokens tells one nothing about the prompts of the other.
Without keys everybody is one tenant, so such a server belongs on loopback (``server.bind_socket`` holds it there).
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from sprat.errors import ServeError

if TYPE_CHECKING:
    from sprat.engine.sequence import Tenant

SCHEME = "bearer"


class ApiKeys:
    """The keys that may ask; none: whoever reaches the server may."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        from sprat.engine.sequence import DEFAULT_TENANT, Tenant

        self._default_tenant = DEFAULT_TENANT
        self._tenants: dict[bytes, Tenant] = {}
        for key in keys:
            self._tenants[_digest(b"key", key)] = Tenant(_digest(b"name", key).hex(), _digest(b"secret", key))

    def __bool__(self) -> bool:
        """Whether a key is needed."""
        return bool(self._tenants)

    def tenant(self, authorization: str, x_api_key: str = "") -> Tenant | None:
        """Whose request it is by its ``Authorization`` or ``x-api-key`` header; None: it may not ask.

        >>> keys = ApiKeys(["k1", "k2"])
        >>> keys.tenant("Bearer k3") is keys.tenant("k1") is None, keys.tenant("Bearer k1") == keys.tenant("bearer k1 ")
        (True, True)
        """
        if not self._tenants:
            return self._default_tenant
        scheme, _, key = authorization.partition(" ")
        tenant = self._tenants.get(_digest(b"key", key.strip())) if scheme.lower() == SCHEME else None
        return tenant or self._tenants.get(_digest(b"key", x_api_key.strip()))


def read_api_keys(path: str | Path) -> tuple[str, ...]:
    """The keys of a file, one a line; blank lines and those that begin with ``#`` are none.

    Warns where others than its owner can read it.

    Raises:
        ServeError: it cannot be read, holds no key, or one that cannot stand in a header.
    """
    try:
        mode = os.stat(path).st_mode
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        what = f"cannot read the API keys: {getattr(error, 'strerror', None) or 'it is no text'}"
        raise ServeError(what, where=str(path), todo="give a text file with one key a line") from None
    rows = [(n, line.strip()) for n, line in enumerate(lines, 1) if line.strip() and not line.lstrip().startswith("#")]
    for number, key in rows:
        check_api_key(key, f"{path}, line {number}")
    keys = tuple(key for _, key in rows)
    if not keys:
        raise ServeError("there is no API key in this file", where=str(path), todo="write one key a line")
    if mode & 0o077:
        warnings.warn(f"{path}: others can read these API keys; chmod 600 it", stacklevel=2)
    return keys


def check_api_key(key: str, where: str) -> None:
    """Raise ServeError where ``key`` cannot stand in an ``Authorization`` header; the message does not have it."""
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        todo = "use letters, digits and punctuation, for example of: openssl rand -hex 32"
        raise ServeError("an API key is empty, or holds blanks or other letters than ASCII's", where=where, todo=todo)


def _digest(purpose: bytes, key: str) -> bytes:
    """SHA-256 of a key for one use, so that what is known of one use says nothing of another."""
    return hashlib.sha256(b"sprat." + purpose + b"\0" + key.encode()).digest()
