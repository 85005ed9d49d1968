"""TLS: the context of a server's certificate, checked before anything is loaded."""

from __future__ import annotations

import ssl
from pathlib import Path

from sprat.errors import ServeError
from sprat.serve.config import ServeConfig


def tls_context(config: ServeConfig) -> ssl.SSLContext | None:
    """What ``config`` says of TLS, or None where it is plain HTTP.

    Raises:
        ServeError: a file is missing or is none of its kind, the key is another's, or its password is wrong.
    """
    if config.ssl_certfile is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    settings = {name: getattr(config, name) for name in ("ssl_certfile", "ssl_keyfile", "ssl_ca_certs")}
    for name, file in settings.items():
        if file is not None:
            _check_readable(name, file)
    where = config.ssl_certfile if config.ssl_keyfile is None else f"{config.ssl_certfile}, {config.ssl_keyfile}"
    password = config.ssl_keyfile_password or ""  # the empty one fails where one is needed; None would ask the terminal
    try:
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password=lambda: password)
    except (ssl.SSLError, ValueError) as error:
        reason = getattr(error, "reason", None) or str(error)
        todo = "give the certificate and its own key as PEM files, and the key's password with ssl_keyfile_password"
        raise ServeError(f"the TLS certificate cannot be used: {_spoken(reason)}", where=where, todo=todo) from None
    if config.ssl_ca_certs is not None:
        try:
            context.load_verify_locations(config.ssl_ca_certs)
        except ssl.SSLError as error:
            what = f"the authorities cannot be read: {_spoken(error.reason or str(error))}"
            raise ServeError(what, where=config.ssl_ca_certs, todo="give a PEM file of certificates") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _check_readable(name: str, file: str) -> None:
    """Raise ServeError where the file of the setting ``name`` cannot be read."""
    try:
        with Path(file).open("rb"):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ServeError(f"cannot read the file of {name}: {reason}", where=file, todo="correct the path") from None


def _spoken(reason: str) -> str:
    """OpenSSL's reason as words.

    >>> _spoken("KEY_VALUES_MISMATCH")
    'key values mismatch'
    """
    return reason.replace("_", " ").lower() if reason.isupper() else reason
