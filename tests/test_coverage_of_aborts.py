"""Every way to end that the table of answers knows has a test that sees it in a record, or a reason why not."""

import ast

import pytest

from harness import ROOT
from proxy.aborts import ANSWERS
from proxy.vocabulary import Cause, Phase, Side
from test_scenarios import OPEN, ROWS

Way = tuple[str, str, str]

# Tests outside of the table of scenarios, each with the (side, phase, cause) of records that it checks.
ELSEWHERE: dict[str, tuple[Way, ...]] = {
    "test_networks.test_a_client_that_vanishes_in_its_head": (("client", "request_head", "dead_peer"),),
    "test_networks.test_a_client_that_vanishes_in_its_own_request": (("client", "request_body", "dead_peer"),),
    "test_networks.test_a_client_that_vanishes_while_the_answer_is_awaited": (
        ("client", "response_head", "dead_peer"),
    ),
    "test_networks.test_a_client_that_vanishes_in_mid_response": (("client", "response_body", "dead_peer"),),
    "test_networks.test_a_client_that_vanishes_in_a_tunnel": (("client", "tunnel", "dead_peer"),),
    "test_first_event.test_who_closes_a_unix_socket_has_left_though_it_might_have_ended_one_side": (
        ("client", "tunnel", "closed"),
    ),
    "test_networks.test_an_upstream_that_vanishes_before_its_answer": (("upstream", "response_head", "dead_peer"),),
    "test_networks.test_an_upstream_that_vanishes_in_mid_answer": (("upstream", "response_body", "dead_peer"),),
    "test_networks.test_an_upstream_that_vanishes_in_mid_request": (("upstream", "request_body", "dead_peer"),),
    "test_networks.test_an_upstream_that_vanishes_in_a_tunnel": (("upstream", "tunnel", "dead_peer"),),
    "test_networks.test_a_client_that_vanishes_while_upstream_is_connected": (("client", "connect", "dead_peer"),),
    "test_networks.test_an_upstream_that_vanishes_in_the_handshake": (("upstream", "tls_handshake", "dead_peer"),),
    "test_hostile.test_an_upstream_that_resets_between_connect_and_first_look": (("upstream", "connect", "reset"),),
    "test_workers.test_a_half_head_is_recorded_when_the_drain_ends": (("proxy", "request_head", "shutdown"),),
    "test_server.test_a_connection_too_many_is_told_so": (("proxy", "request_head", "limit"),),
    "test_scenarios.test_shutdown_ends_what_is_left_in_any_phase": (
        ("proxy", "connect", "shutdown"),
        ("proxy", "request_body", "shutdown"),
        ("proxy", "response_head", "shutdown"),
        ("proxy", "tunnel", "shutdown"),
    ),
    "test_scenarios.test_sigterm_in_mid_response_ends_it_after_the_drain_time": (
        ("proxy", "response_body", "shutdown"),
    ),
    "test_server.test_without_descriptors_requests_fail_for_a_resource_and_it_recovers": (
        ("proxy", "connect", "resource"),
    ),
}

_NO_RECORD = "no request has begun in a handshake with a client: it is a connection.abort (test_scenarios, test_server)"
_ADMIN = "the admin listener is not in this version"
_INJECTED = "bugs and lack of memory are injected at every layer by test_record, which checks side, cause and answer"

# (side, phases, causes), and why no test makes them.
NOT_MADE: tuple[tuple[Side, tuple[Phase, ...], tuple[Cause, ...], str], ...] = (
    (Side.CLIENT, (Phase.TLS_HANDSHAKE,), tuple(Cause), _NO_RECORD),
    (Side.PROXY, (Phase.TLS_HANDSHAKE,), tuple(Cause), _NO_RECORD),
    (Side.PROXY, tuple(Phase), (Cause.KILLED,), _ADMIN),
    (Side.PROXY, tuple(Phase), (Cause.INTERNAL, Cause.RESOURCE), _INJECTED),
    (Side.CLIENT, (Phase.REQUEST_HEAD,), (Cause.UNAUTHORIZED,), "this version asks nobody for credentials"),
)


def _ways(side: str, phase: str, cause: str) -> set[Way]:
    return set() if OPEN in (side, phase, cause) else {(side, phase, cause)}


def made() -> set[Way]:
    """Returns: what tests make and check."""
    found: set[Way] = set()
    for row in ROWS:
        if row.event not in (None, "complete"):
            found |= _ways(row.side, row.phase, row.cause)
    for ways in ELSEWHERE.values():
        found |= set(ways)
    return found


def not_made() -> dict[Way, str]:
    """Returns: what no test makes, and why."""
    return {
        (str(side), str(phase), str(cause)): why
        for side, phases, causes, why in NOT_MADE
        for phase in phases
        for cause in causes
        if (side, phase, cause) in ANSWERS
    }


def test_every_way_to_end_is_tested_or_has_a_reason() -> None:
    known = {(str(side), str(phase), str(cause)) for side, phase, cause in ANSWERS}
    tested, reasons = made(), not_made()
    assert not tested - known, "these are not in the table"
    assert not known - tested - set(reasons), "these have neither a test nor a reason"


def test_no_reason_is_idle() -> None:
    for side, phases, causes, why in NOT_MADE:
        ways = {(str(side), str(phase), str(cause)) for phase in phases for cause in causes}
        assert ways & set(not_made()), why


@pytest.mark.parametrize("name", ELSEWHERE)
def test_tests_elsewhere_exist_and_look_at_the_cause(name: str) -> None:
    module, function = name.split(".")
    text = (ROOT / "tests" / f"{module}.py").read_text()
    (found,) = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == function]
    source = ast.get_source_segment(text, found) or ""
    for _, phase, cause in ELSEWHERE[name]:
        assert f'"{cause}"' in source
        assert f'"{phase}"' in source or any(
            f'"{phase}"' in ast.unparse(mark) or f"'{phase}'" in ast.unparse(mark) for mark in found.decorator_list
        )
