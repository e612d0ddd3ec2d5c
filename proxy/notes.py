"""What a configuration may say, and what is still worth a look: ``check`` prints it, ``serve`` logs it as it starts.

Nothing here is refused. What can't work at all is ``ConfigError``'s, and is found where it is read.
"""

import collections.abc
import ipaddress
import os
import stat

from .config import Settings, TcpAddress, ignored_variables
from .kernel import most_open_files
from .masking import path_text
from .tls import certificate_notes

# A relayed connection has a socket on each side; what a worker has open besides is less than this.
_FILES_EACH, _FILES_BESIDE = 2, 64
# The kernel probes in whole seconds, and answers of a busy peer take their time (docs/kernel.md).
_SOON_DEAD_S = 1.5
_PAIRS = ("client_read", "client_write", "upstream_write", "upstream_read")


def configuration_notes(settings: Settings, environ: collections.abc.Mapping[str, str]) -> list[str]:
    """Returns: sentences for a person, most often none."""
    return [
        *_exposure_notes(settings),
        *_upstream_notes(settings),
        *certificate_notes(settings),
        *_limit_notes(settings),
        *(f"{path_text(name)} is no option, and is ignored" for name in ignored_variables(environ)),
    ]


def _exposure_notes(settings: Settings) -> list[str]:
    """Find a daemon that trusts whoever reaches its socket put on a network for everybody."""
    listen = settings.listen
    if not isinstance(listen, TcpAddress) or settings.upstream.scheme != "unix" or settings.tls_client_ca is not None:
        return []
    if _is_loopback(listen.host):
        return []
    return [
        f"whoever reaches {listen} has all that {settings.upstream} offers, and behind a docker socket that is root on"
        " this machine: listen on 127.0.0.1 or a unix socket, or ask for certificates with tls_client_ca"
    ]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"  # another name may stand for anything


def _upstream_notes(settings: Settings) -> list[str]:
    """Look at the upstream's socket as a connect would find it."""
    if settings.upstream.scheme != "unix":
        return []
    path = settings.upstream.path
    what = f"upstream socket {path!r}"
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return [f"{what} does not exist now; requests get 502 until it does"]
    except OSError as error:
        return [f"{what} can't be looked at ({error.strerror}); requests get 502 while that is so"]
    if not stat.S_ISSOCK(mode):
        return [f"{what} is no socket; requests get 502 until one is there"]
    if not os.access(path, os.W_OK):
        return [
            f"{what} may not be written by this user; requests get 502 while that is so: run as its owner or in its"
            " group (docker's is docker)"
        ]
    return []


def _limit_notes(settings: Settings) -> list[str]:
    """Find limits of which one leaves the other no room."""
    notes = []
    files, connections = most_open_files(), settings.max_connections
    needed = _FILES_EACH * -(-connections.value // settings.workers) + _FILES_BESIDE
    if files is not None and files < needed:
        notes.append(
            f"{connections} takes {needed:,} open files in each worker, and {files:,} are allowed (ulimit -Hn); beyond"
            " them requests get 503"
        )
    dead = settings.peer_dead_timeout
    if dead is not None and dead.seconds < _SOON_DEAD_S:
        notes.append(
            f"{dead} may give up a peer that is only slow to answer; {_SOON_DEAD_S:g} s is long enough for most"
        )
    for pair in _PAIRS:
        timeout, deadline = getattr(settings, f"{pair}_timeout"), getattr(settings, f"{pair}_deadline")
        # Where they are equal both may begin at once, and of a tie the timeout is told.
        if timeout is not None and deadline is not None and timeout.seconds > deadline.seconds:
            notes.append(f"{timeout} never ends anything, as {deadline} does so before it")
    return notes
