"""The table from side, phase and cause to what the client is told, and from errors to causes."""

import errno
import itertools
import os
import socket
import ssl

import pytest

from proxy.aborts import ANSWERS, Abort, classify, socket_abort, tls_error_type
from proxy.reply import REASONS
from proxy.vocabulary import Cause, Operation, Phase, Side

# RFC 9209 §2.3
ERROR_TYPES = {
    "dns_timeout dns_error destination_not_found destination_unavailable destination_ip_prohibited",
    "destination_ip_unroutable connection_refused connection_terminated connection_timeout connection_read_timeout",
    "connection_write_timeout connection_limit_reached tls_protocol_error tls_certificate_error tls_alert_received",
    "http_request_error http_request_denied http_response_incomplete http_response_header_section_size",
    "http_response_header_size http_response_body_size http_response_trailer_section_size http_response_trailer_size",
    "http_response_transfer_coding http_response_content_coding http_response_timeout http_upgrade_failed",
    "http_protocol_error proxy_internal_response proxy_internal_error proxy_configuration_error proxy_loop_detected",
}
KNOWN_TYPES = {name for line in ERROR_TYPES for name in line.split()}
STATUSES = {400, 401, 403, 405, 408, 413, 414, 429, 431, 501, 502, 503, 504, 505}


def test_every_answer_is_one_of_the_contract() -> None:
    for (side, phase, cause), (status, error_type) in ANSWERS.items():
        where = (side, phase, cause)
        assert status is None or status in STATUSES, where
        assert error_type is None or error_type in KNOWN_TYPES, where
        if side is Side.CLIENT and phase in (Phase.REQUEST_HEAD, Phase.REQUEST_BODY):
            assert error_type in (None, "http_request_error"), where
        if side is Side.UPSTREAM:
            assert error_type is not None, where
            assert status is not None, where


def test_every_combination_makes_an_abort_that_can_be_printed() -> None:
    for side, phase, cause in itertools.product(Side, Phase, Cause):
        abort = Abort(side, phase, None, cause)
        assert (abort.status, abort.error_type) == ANSWERS.get((side, phase, cause), (None, None))
        assert str(abort).startswith(f"{side} {phase}")


def test_every_status_of_the_contract_has_its_reason() -> None:
    assert set(REASONS) == STATUSES


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (ssl.SSLEOFError(8, "EOF"), Cause.TLS),
        (ssl.SSLCertVerificationError(1, "x"), Cause.TLS),
        (socket.gaierror(socket.EAI_NONAME, "x"), Cause.DNS),
        (ConnectionRefusedError(errno.ECONNREFUSED, "x"), Cause.REFUSED),
        (BrokenPipeError(errno.EPIPE, "x"), Cause.RESET),
        (ConnectionResetError(errno.ECONNRESET, "x"), Cause.RESET),
        (TimeoutError(errno.ETIMEDOUT, "x"), Cause.DEAD_PEER),
        (FileNotFoundError(errno.ENOENT, "x"), Cause.UNREACHABLE),
        (PermissionError(errno.EACCES, "x"), Cause.UNREACHABLE),
        (OSError(errno.EMFILE, "x"), Cause.RESOURCE),
    ],
)
def test_causes_of_a_failed_connect_go_by_type_and_errno(error: OSError, cause: Cause) -> None:
    assert classify(error, Operation.CONNECT) is cause


@pytest.mark.parametrize(
    "number",
    [
        # What routers and firewalls answer, and the routes of this machine: to nowhere, and prohibited.
        errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ECONNREFUSED, errno.EACCES, errno.EPERM, errno.EINVAL,
        errno.ENOPROTOOPT, errno.EPROTO, errno.ETIMEDOUT,
    ],
)  # fmt: skip
@pytest.mark.parametrize("operation", [Operation.READ, Operation.WRITE, Operation.HANDSHAKE])
def test_whatever_it_says_the_kernel_has_given_up_a_connection_that_stood(number: int, operation: Operation) -> None:
    assert classify(OSError(number, os.strerror(number)), operation) is Cause.DEAD_PEER


@pytest.mark.parametrize("operation", Operation)
@pytest.mark.parametrize("number", [errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN, errno.ECONNABORTED])
def test_what_ends_a_connection_is_a_reset(number: int, operation: Operation) -> None:
    assert classify(OSError(number, os.strerror(number)), operation) is Cause.RESET


def test_out_of_files_is_the_proxys_own_doing() -> None:
    abort = socket_abort(Side.UPSTREAM, Phase.CONNECT, Operation.CONNECT, OSError(errno.EMFILE, "x"))
    assert (abort.side, abort.status, abort.error_type) == (Side.PROXY, 503, "proxy_internal_error")


def test_a_certificate_error_is_told_from_other_tls_errors() -> None:
    assert tls_error_type(ssl.SSLCertVerificationError(1, "x")) == "tls_certificate_error"
    assert tls_error_type(ssl.SSLError(1, "x")) == "tls_protocol_error"
    assert tls_error_type(OSError(1, "x")) is None
