"""Makes the proxy fail where a test wants it to: Python imports this at its start where PYTHONPATH has its directory.

A fault goes off once, as soon as a file of its name is in the directory that FAULTS names, and takes the file away.
"""

import builtins
import collections.abc
import functools
import importlib
import os
import typing

DIRECTORY = os.environ["FAULTS"]
KIND: type[Exception] = getattr(builtins, os.environ.get("FAULT_KIND", "RuntimeError"))

# Where the proxy can be made to fail: the name that a module, or a class in it, looks up.
PLACES = {
    "exchange": """
        parse_request_head check_partial_head prepare_request serialize_request request_framing Relay
        socket_evidence error_response ClientConnection._judge ClientConnection._exchange ClientConnection._read_head
        ClientConnection._connect ClientConnection._return_lease ClientConnection._settle ClientConnection._drop_lease
        ClientConnection._tell_client ClientConnection._answer ClientConnection._await_delivery
        ClientConnection._ending_after ClientConnection._end ClientConnection._linger
        ClientConnection._exchange_at_once ClientConnection._relay parse_response_head prepare_response
        serialize_response AtOnce""",
    "upstream": """
        _LeasingPool.lease _LeasingPool.release _LeasedConnection._connect _LeasedConnection.open endpoint_name""",
    "relay": """
        Relay.attach Relay.run Relay.release Relay._read_upstream Relay._take_head Relay._flush_response
        Relay._pump_request Relay._begin_tunnel Relay._splice parse_response_head prepare_response serialize_response
        response_framing Flow.push""",
    "framing": "LengthFraming.feed ChunkedFraming.feed",
    "kernel": "SplicePipe.fill SplicePipe.drain",
    "waiting": "Waiter.wait",
    "record": """
        Record.fields Record._complete_line Record._abort_fields Record.sentence Record.bytes describe_exception
        describe_limit timestamp""",
    "log": "EventLog.write EventLog.event LineFile.write RecordFormatter.line",
}


def go_off(name: str) -> None:
    """Raise if the fault of that name is armed. Its text is what no log line may be broken by."""
    try:
        os.unlink(os.path.join(DIRECTORY, name))
    except FileNotFoundError:
        return
    raise KIND(f'injected at {name}, "quoted"\r\n{{"event":"request.complete"}}\x1b[31m \u2028 \udcff')


def _faulty(
    function: collections.abc.Callable[..., typing.Any], name: str
) -> collections.abc.Callable[..., typing.Any]:
    @functools.wraps(function, updated=())
    def call(*arguments: object, **named: object) -> object:
        go_off(name)
        return function(*arguments, **named)

    return call


def _install() -> None:
    for module_name, places in PLACES.items():
        module = importlib.import_module(f"proxy.{module_name}")
        for place in places.split():
            *owners, attribute = place.split(".")
            owner = functools.reduce(getattr, owners, module)
            setattr(owner, attribute, _faulty(getattr(owner, attribute), f"{module_name}.{place}"))
    endpoint = importlib.import_module("proxy.endpoint").Endpoint
    initialize = endpoint.__init__

    # Sockets are read and written by their own methods, kept in the endpoint.
    def make(self: typing.Any, *arguments: typing.Any) -> None:
        initialize(self, *arguments)
        for operation in ("read", "read_into", "write"):
            setattr(self, operation, _faulty(getattr(self, operation), f"{self.side.value}.{operation}"))

    endpoint.__init__ = make


_install()
