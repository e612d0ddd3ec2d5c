"""TLS contexts for both sides. Which protocol versions, certificates and names are accepted is decided here;
handshakes run in ``exchange``, those of upstream in ``upstream``.
"""

import contextlib
import os
import ssl
import stat
import typing

import certifi

from .config import ConfigError, Settings
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
    handshake to ``upstream``, whose limits and whose watch over the client cover it. Chain and host name are checked by
    the handshake itself.
    """

    host: str  # what the certificate must be good for: a name or an address

    def wrap_socket(self, sock: typing.Any, *args: object, **kwargs: typing.Any) -> typing.Any:
        """Called by urllib3. Returns: an endpoint that has not shaken hands."""
        # urllib3 1.26 gives no server_hostname for an address, and without one OpenSSL checks the chain alone.
        return TlsEndpoint(sock, Side.UPSTREAM, "", None, self, kwargs.get("server_hostname") or self.host)


def upstream_context(settings: Settings) -> UpstreamContext | None:
    """Make the context for an ``https://`` upstream: its chain and host name are always checked.

    Returns: None where upstream is not ``https://``.
    Raises: ConfigError for files that can't be read or used.
    """
    if settings.upstream.scheme != "https":
        return None
    context = UpstreamContext(ssl.PROTOCOL_TLS_CLIENT)
    context.host = settings.upstream.host
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


def certificate_notes(settings: Settings) -> list[str]:
    """Returns: what is allowed and still worth a look in the certificates that the proxy shows: their purpose, their
    time, who may read the key.
    """
    notes = []
    for name, cert, key in (
        ("tls_cert", settings.tls_cert, settings.tls_key),
        ("upstream_cert", settings.upstream_cert, settings.upstream_key),
    ):
        if cert is None:
            continue
        path = key or cert
        # Both files were read a moment ago: where one of these two looks fails now, whoever renews them is at work.
        with contextlib.suppress(OSError):
            problem = _why_refused(cert, key, of_client=name == "upstream_cert")
            if problem is not None:
                notes.append(f"{name} {cert!r}: {problem}; peers that check it will refuse it")
        with contextlib.suppress(OSError):
            if os.stat(path).st_mode & 0o004:
                notes.append(f"the key in {path!r} can be read by every user; chmod o-r mends it")
    return notes


def _why_refused(cert: str, key: str | None, *, of_client: bool) -> str | None:
    """Look at a certificate as a peer that trusts it would, in a handshake inside memory. ``of_client``: as a server
    would.

    Returns: what such a peer says if the certificate is not for this purpose, or else not valid now; None if it is.
    """
    serves, asks = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    asks.check_hostname = False
    asks.verify_mode = ssl.CERT_NONE
    for context in (serves, asks):
        context.load_cert_chain(cert, key)
    looks = serves if of_client else asks
    looks.load_verify_locations(cafile=cert)
    looks.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    looks.verify_mode = ssl.CERT_REQUIRED
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    server, client = serves.wrap_bio(there, back, server_side=True), asks.wrap_bio(back, there)
    for side in (client, server, client, server):
        try:
            side.do_handshake()
        except ssl.SSLWantReadError:
            continue  # it is the other's turn
        except ssl.SSLCertVerificationError as error:
            return error.verify_message if error.verify_code in _REFUSALS else None
    return None


# X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED and X509_V_ERR_INVALID_PURPOSE
_REFUSALS = (9, 10, 26)


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
        problem = _why_unusable(error.reason or str(error), cert, key, f"--{key_name.replace('_', '-')}")
        raise ConfigError(f"{where}: can't be used: {problem}") from error


_CERTIFICATE = b"-----BEGIN CERTIFICATE-----"
_PRIVATE_KEY = b" PRIVATE KEY-----"
# What OpenSSL refuses at its level of security, by its own names.
_TOO_WEAK = ("EE_KEY_TOO_SMALL", "CA_KEY_TOO_SMALL", "CA_MD_TOO_WEAK", "EE_MD_TOO_WEAK")


def _why_unusable(reason: str, cert: str, key: str | None, key_flag: str) -> str:
    """Returns: what is wrong with the files of an identity, and how to mend it: OpenSSL names neither."""
    with open(cert, "rb") as file:
        certificate = file.read()
    key_octets = certificate
    if key is not None:
        with open(key, "rb") as file:
            key_octets = file.read()
    if reason in _TOO_WEAK:
        return f"{reason}; make a new one, with a key of 2048 bits or more and SHA-256"
    if _CERTIFICATE not in certificate:
        what = "a key and no certificate" if _PRIVATE_KEY in certificate else "no PEM certificate"
        return (
            f"{cert!r} holds {what}; name a file with -----BEGIN CERTIFICATE----- in it (openssl x509 converts others)"
        )
    if _PRIVATE_KEY not in key_octets:
        if key is None:
            return f"it holds no key; set {key_flag} too"
        return f"{key!r} holds no PEM key; name a file with -----BEGIN PRIVATE KEY----- in it"
    if reason == "KEY_VALUES_MISMATCH":
        mend = "name the key that was made with it"
        if certificate.count(_CERTIFICATE) > 1:
            mend += ", or put that certificate before those of its issuers"
        return f"the key does not belong to the certificate, the first in {cert!r}; {mend}"
    return f"{reason}; look at the files with openssl x509 -noout -text and openssl pkey -noout: they may be damaged"


def _load_authorities(context: ssl.SSLContext, settings: Settings, name: str, path: str) -> None:
    where = f"{name} {path!r} ({settings.sources[name]})"
    _check_readable(where, path)
    try:
        context.load_verify_locations(cafile=path)
    except ssl.SSLError as error:
        raise ConfigError(
            f"{where}: holds no usable PEM certificate: {error.reason or error};"
            " name a file with the -----BEGIN CERTIFICATE----- of each CA in it"
        ) from error


def _check_readable(where: str, path: str) -> None:
    try:
        # Before it is opened: that could wait for ever. And it is read more than once, which no pipe allows.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ConfigError(f"{where}: {path!r} is no file; name a regular one")
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        raise ConfigError(
            f"{where}: can't read {path!r}: {error.strerror}; check the path and its permissions"
        ) from error
