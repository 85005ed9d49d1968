"""API keys, and the tenant that each one stands for.

A key is kept as its SHA-256 only, and no message or log holds either. What a key decides is the *tenant*: whose turn it
is in the engine, and the secret that takes part in the keys of cached blocks. Two keys therefore share nothing that was
computed, in memory or on disk, and the count of cached tokens tells one nothing about the prompts of the other.
Without keys everybody is one tenant, so such a server belongs on loopback (``server.bind_socket`` holds it there).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

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

    def tenant(self, authorization: str) -> Tenant | None:
        """Whose request it is by its ``Authorization`` header; None: it may not ask.

        >>> keys = ApiKeys(["k1", "k2"])
        >>> keys.tenant("Bearer k3") is keys.tenant("k1") is None, keys.tenant("Bearer k1") == keys.tenant("bearer k1 ")
        (True, True)
        """
        if not self._tenants:
            return self._default_tenant
        scheme, _, key = authorization.partition(" ")
        return self._tenants.get(_digest(b"key", key.strip())) if scheme.lower() == SCHEME else None


def _digest(purpose: bytes, key: str) -> bytes:
    """SHA-256 of a key for one use, so that what is known of one use says nothing of another."""
    return hashlib.sha256(b"sprat." + purpose + b"\0" + key.encode()).digest()
