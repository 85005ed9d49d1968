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
        reason, todo = _spoken(getattr(error, "reason", None) or str(error)), "give the certificate and its own key"
        if "mismatch" not in reason:
            reason, todo = _fault_of_files(config) or (reason, todo)
        what = f"the TLS certificate cannot be used: {reason}"
        raise ServeError(what, where=where, todo=todo) from None
    if config.ssl_ca_certs is not None:
        try:
            context.load_verify_locations(config.ssl_ca_certs)
        except ssl.SSLError as error:
            what = f"the authorities cannot be read: {_spoken(error.reason or str(error))}"
            raise ServeError(what, where=config.ssl_ca_certs, todo="give a PEM file of certificates") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _fault_of_files(config: ServeConfig) -> tuple[str, str] | None:
    """What is wrong and what to do, where the files tell: OpenSSL says "PEM lib" of all of it."""
    assert config.ssl_certfile is not None
    key_file = config.ssl_keyfile or config.ssl_certfile
    certificate, key = (
        Path(file).read_text(encoding="ascii", errors="replace") for file in (config.ssl_certfile, key_file)
    )
    if "BEGIN CERTIFICATE" not in certificate:
        return f"there is no certificate in {config.ssl_certfile}", "give a PEM file"
    if "PRIVATE KEY-----" not in key:
        return f"there is no private key in {key_file}", "give one with ssl_keyfile, as PEM"
    if "ENCRYPTED" in key:
        what = "the password of its key is wrong" if config.ssl_keyfile_password else "its key has a password"
        return what, "say ssl_keyfile_password in the file of --config, or take it off (openssl pkey -in KEY -out FILE)"
    return None


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
