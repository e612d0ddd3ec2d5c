"""TLS contexts for both sides. Which protocol versions, certificates and names are accepted is decided here;
handshakes run in ``exchange``.
"""

import ssl
import typing

import certifi

from .config import ConfigError, Settings, UpstreamUrl
from .endpoint import TlsEndpoint
from .vocabulary import Side


def server_context(settings: Settings) -> ssl.SSLContext | None:
    """Make the context that serves clients: TLS 1.2 and 1.3, ``http/1.1`` only, client certificates where a CA for
    them is set.

    Returns: None where the listener speaks plain HTTP.
    Raises: ConfigError for files that can't be read or used.
    """
    if settings.tls_cert is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    _load_identity(context, settings, "tls_cert", settings.tls_cert, "tls_key", settings.tls_key)
    if settings.tls_client_ca is not None:
        _load_authorities(context, settings, "tls_client_ca", settings.tls_client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


class UpstreamContext(ssl.SSLContext):
    """The context that urllib3 is given: it makes a ``TlsEndpoint`` in place of an ``SSLSocket`` and leaves the
    handshake to the relay, whose limits and whose watch over the client cover it. Chain and host name are checked by
    the handshake itself.
    """

    def wrap_socket(self, sock: typing.Any, *args: object, **kwargs: typing.Any) -> typing.Any:
        """Called by urllib3. Returns: an endpoint that has not shaken hands."""
        return TlsEndpoint(sock, Side.UPSTREAM, "", None, self, kwargs.get("server_hostname"))


def upstream_context(settings: Settings) -> UpstreamContext | None:
    """Make the context for an ``https://`` upstream: its chain and host name are always checked.

    Returns: None where upstream is not ``https://``.
    Raises: ConfigError for files that can't be read or used.
    """
    url: UpstreamUrl = settings.upstream
    if url.scheme != "https":
        return None
    context = UpstreamContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    if settings.upstream_ca == "system":
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    else:
        _load_authorities(context, settings, "upstream_ca", settings.upstream_ca or certifi.where())
    if settings.upstream_cert is not None:
        _load_identity(
            context, settings, "upstream_cert", settings.upstream_cert, "upstream_key", settings.upstream_key
        )
    return context


class Contexts(typing.NamedTuple):
    """What the certificate files held when they were last read and were good."""

    server: ssl.SSLContext | None
    upstream: UpstreamContext | None


def read_contexts(settings: Settings) -> Contexts:
    """Read the certificate files. Raises: ConfigError."""
    try:
        return Contexts(server_context(settings), upstream_context(settings))
    except OSError as error:
        # Each file was readable a moment ago: whoever renews it is at work.
        raise ConfigError(f"a certificate file changed while it was read: {error}; try again") from error


def _load_identity(
    context: ssl.SSLContext, settings: Settings, cert_name: str, cert: str, key_name: str, key: str | None
) -> None:
    where = f"{cert_name} {cert!r} ({settings.sources[cert_name]})"
    if key is not None:
        where += f" with {key_name} {key!r} ({settings.sources[key_name]})"
    for path in (cert, key):
        if path is not None:
            _check_readable(where, path)

    def no_passphrase() -> str:
        raise ConfigError(
            f"{where}: the key is encrypted, and nobody is there to type its passphrase; use an unencrypted key file"
        )

    try:
        context.load_cert_chain(cert, key, password=no_passphrase)
    except ssl.SSLError as error:
        hint = "both must be PEM"
        if error.reason == "KEY_VALUES_MISMATCH":
            hint = "the key does not belong to the certificate"
        elif key is None and not _holds_key(cert):
            hint = f"it holds no key; set --{key_name.replace('_', '-')} too"
        raise ConfigError(f"{where}: can't be used: {error.reason or error}; {hint}") from error


def _holds_key(path: str) -> bool:
    with open(path, "rb") as file:
        return b" PRIVATE KEY-----" in file.read()


def _load_authorities(context: ssl.SSLContext, settings: Settings, name: str, path: str) -> None:
    where = f"{name} {path!r} ({settings.sources.get(name, 'default')})"
    _check_readable(where, path)
    try:
        context.load_verify_locations(cafile=path)
    except ssl.SSLError as error:
        raise ConfigError(f"{where}: holds no usable PEM certificate: {error.reason or error}") from error


def _check_readable(where: str, path: str) -> None:
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        raise ConfigError(
            f"{where}: can't read {path!r}: {error.strerror}; check the path and its permissions"
        ) from error
