"""Responses the proxy makes itself: status, ``Proxy-Status`` (RFC 9209), request id, and the JSON body the docker CLI
prints.
"""

import json
import time

from .aborts import Abort

REASONS = {
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    405: "Method Not Allowed",
    408: "Request Timeout",
    413: "Content Too Large",
    414: "URI Too Long",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    501: "Not Implemented",
    502: "Bad Gateway",
    503: "Service Unavailable",
    504: "Gateway Timeout",
    505: "HTTP Version Not Supported",
}


def structured_string(text: str) -> str:
    """Returns: ``text`` as an sf-string of RFC 8941, cut to 512 characters; what is not printable ASCII becomes
    ``?``.
    """
    visible = "".join(c if " " <= c <= "~" else "?" for c in text[:512])
    return '"' + visible.replace("\\", "\\\\").replace('"', '\\"') + '"'


def error_response(
    abort: Abort, status: int, message: str, proxy_name: str, request_id: str | None, *, head_only: bool
) -> bytes:
    """Make a whole response that tells the client why its request failed, and closes the connection.

    ``request_id`` is None where no request had begun. ``head_only`` leaves the body off, for HEAD.
    Returns: octets to write.
    """
    body = json.dumps({"message": message}).encode("ascii") + b"\n"
    # A proxy name starts with a letter where it is an sf-token; RFC 9209 takes a string as well.
    token_like = proxy_name[:1].isalpha() and all(c.isalnum() or c in "!#$%&'*+-.^_`|~:/" for c in proxy_name)
    proxy_status = proxy_name if token_like else structured_string(proxy_name)
    if abort.error_type is not None:
        proxy_status += f"; error={abort.error_type}"
        if abort.error_type == "http_request_error":
            proxy_status += f"; status-code={status}"
    proxy_status += f"; details={structured_string(message)}"
    lines = [
        f"HTTP/1.1 {status} {REASONS.get(status, 'Error')}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-store",
        f"Date: {time.strftime('%a, %d %b %Y %H:%M:%S GMT', time.gmtime())}",
        f"Proxy-Status: {proxy_status}",
        "Connection: close",
    ]
    if request_id is not None:
        lines.insert(-1, f"X-Request-Id: {request_id}")
    if status == 405:
        lines.append("Allow: DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT")
    head = ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")
    return head if head_only else head + body
