"""Octets of peers as text for a log: what is not printable escaped, secrets in a target masked."""

import os
import re
import urllib.parse

# User information of the target's own authority. Here and below it ends before the last "@" before what can't be in it.
_OWN_USER_INFORMATION = re.compile(rb"((?:[a-z][a-z0-9+.\-]*://)?)[^/?#]+(?=@)", re.IGNORECASE)
# That of a URL further in; of one whose delimiters are percent-encoded.
_USER_INFORMATION = re.compile(
    rb"((?::|%3a)(?:/|%2f){2})(?:(?<=://)[^/?#&]*(?=@)|(?:(?!%2f)[^/?#&])*(?=@|%40))", re.IGNORECASE
)
_QUERY = re.compile(rb"[?&]")
# The name of a query field: some servers have ";" between fields, and a URL that is a value has fields of its own,
# percent-encoded or not.
_FIELD_NAME = re.compile(rb"(?:[&?;]|%(?:26|3f|3b))((?:[^&?;=%]++|%(?!26|3f|3b|3d))*+)(?:=|%3d)", re.IGNORECASE)
_SECRET_NAMES = frozenset(
    b"access_token api-key api_key apikey auth authorization client_secret credential credentials id_token jwt key pass"
    b" passwd password pwd refresh_token secret secret_key session sig signature token x-amz-credential"
    b" x-amz-security-token x-amz-signature x-goog-credential x-goog-signature".split()
)


def printable(octets: bytes) -> str:
    """Returns: ``octets`` as text for a log: printable ASCII as it is, all else as ``\\xNN``."""
    text = octets.decode("ascii", "backslashreplace")
    return text if text.isprintable() else "".join(c if " " <= c <= "~" else f"\\x{ord(c):02x}" for c in text)


def path_text(path: str) -> str:
    """Returns: a path of the file system as text for a log: octets that are no UTF-8 as ``\\xNN``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def mask_user(text: str) -> str:
    """Returns: ``text`` as an error may quote it: the user information of a URL in it replaced by ``***``."""
    return re.sub(r"(//)[^/].*@", r"\1***@", text)


def mask_secrets(target: bytes) -> bytes:
    """Returns: ``target`` with user information and the values of known secret query fields replaced by ``***``; a
    fragment, which no target has, goes.
    """
    if b"@" in target or b"%40" in target:
        own = _OWN_USER_INFORMATION.match(target)
        if own is not None:
            target = own[1] + b"***" + target[own.end() :]
        parts = _USER_INFORMATION.split(target)
        parts[1::2] = [before + b"***" for before in parts[1::2]]
        target = b"".join(parts)
    target, fragment, _ = target.partition(b"#")
    query = _QUERY.search(target)
    if query is not None:
        target = _mask_fields(target, query.start())
    return target + b"#***" if fragment else target


def _mask_fields(target: bytes, query_at: int) -> bytes:
    # All names at once, as a target may have tens of thousands: none of them holds the "&" that joins them, nor does
    # one in another spelling.
    names = urllib.parse.unquote_to_bytes(b"&".join(_FIELD_NAME.findall(target, query_at))).lower().split(b"&")
    if _SECRET_NAMES.isdisjoint(names):
        return target
    parts: list[bytes] = []
    kept_from = 0
    for name, match in zip(names, _FIELD_NAME.finditer(target, query_at), strict=True):
        if name in _SECRET_NAMES and match.start() >= kept_from:
            parts += target[kept_from : match.end()], b"***"
            kept_from = target.find(b"&", match.end())
            if kept_from < 0:
                return b"".join(parts)
    return b"".join([*parts, target[kept_from:]])
