"""Octets of peers as text for a log: what is not printable escaped, secrets in a target masked."""

import os
import re
import urllib.parse

# User information: of the target's own authority; of a URL further in; of one whose delimiters are percent-encoded. It
# ends with the last "@" before what can't be in it.
_USER_INFORMATION = re.compile(
    rb"^((?:[a-z][a-z0-9+.\-]*://)?)[^/?#]+(@)|(://)[^/?#&]*(@)|((?::|%3a)(?:/|%2f){2})(?:(?!%2f)[^/?#&])*(@|%40)",
    re.IGNORECASE,
)
# The name of a query field within what stands between two "&": some servers have ";" between fields, and a URL that is
# a value has fields of its own, percent-encoded or not.
_FIELD_NAME = re.compile(rb"(?:^|[?;]|%3f|%26|%3b)((?:(?!%3[fbd]|%26)[^=?;])*+)(?:=|%3d)", re.IGNORECASE)
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
        target = _USER_INFORMATION.sub(rb"\1\3\5***\2\4\6", target)
    if b"?" not in target and b"&" not in target and b"#" not in target:
        return target
    target, fragment, _ = target.partition(b"#")
    first, *others = target.split(b"&")
    path, mark, field = first.partition(b"?")
    masked = b"&".join([path + mark + _mask_field(field), *map(_mask_field, others)])
    return masked + (b"#***" if fragment else b"")


def _mask_field(field: bytes) -> bytes:
    for match in _FIELD_NAME.finditer(field):
        name = match[1]
        if (urllib.parse.unquote_to_bytes(name) if b"%" in name else name).lower() in _SECRET_NAMES:
            return field[: match.end()] + b"***"
    return field
