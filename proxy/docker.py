"""All that is Docker's: which answers are raw streams, which are JSON message streams, and the error line the CLI
prints.

Everything else treats a docker daemon as any HTTP/1.1 server.
"""

import json
import re

from .framing import ConnectionFraming, Framing
from .head import RequestHead, ResponseHead

# What an absolute-form target has before its path (RFC 9112 §3.2.2).
_ORIGIN = rb"(?:[Hh][Tt][Tt][Pp][Ss]?://[^/?]*)?"
# dockerd hijacks the connection for these without being asked to upgrade: API before 1.24 and clients that never ask.
_HIJACKING_TARGET = re.compile(_ORIGIN + rb"(?:/v[0-9.]+)?/(?:containers/[^/?]+/attach|exec/[^/?]+/start)(?:\?.*)?")
_RAW_STREAMS = (b"application/vnd.docker.raw-stream", b"application/vnd.docker.multiplexed-stream")
_MESSAGE_STREAM_TARGET = re.compile(
    _ORIGIN + rb"(?:/v[0-9.]+)?/(?:build|images/create|images/load|images/.+/push)(?:\?.*)?"
)


def hijacks(request: RequestHead, response: ResponseHead, framing: Framing) -> bool:
    """Whether a plain 200 turns the connection into a raw stream both ways, as dockerd's attach and exec do."""
    return (
        response.status == 200
        and isinstance(framing, ConnectionFraming)
        and request.method == b"POST"
        and (response.section.first(b"content-type") or b"") in _RAW_STREAMS
        and _HIJACKING_TARGET.fullmatch(request.target) is not None
    )


def is_message_stream(request: RequestHead, response: ResponseHead) -> bool:
    """Whether the response is Docker's JSON message stream, whose last line the CLI prints as an error."""
    section = response.section
    content_type = section.first(b"content-type")
    return (
        content_type is not None
        and response.status == 200
        and section.content_length is None
        and request.method == b"POST"
        and content_type.split(b";", 1)[0].strip(b" \t").lower() == b"application/json"
        and b"content-encoding" not in section.known
        and _MESSAGE_STREAM_TARGET.fullmatch(request.target) is not None
    )


def error_line(message: str) -> bytes:
    """Returns: the line of a JSON message stream that the docker CLI prints in place of ``unexpected EOF``."""
    return json.dumps({"errorDetail": {"message": message}, "error": message}).encode("ascii") + b"\r\n"
