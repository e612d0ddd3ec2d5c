"""Which options there are, and the value of each with the place where it was set.

One table, ``OPTIONS``, is behind flags, environment, file, help and documents. Flag beats environment beats file beats
default. Whatever is wrong (an unknown option, a bad value, a file that can't be read) is a ``ConfigError`` of one line
with name, value, source and mend. Files that other options name are not opened here: ``tls`` and ``cli`` do that.
"""

import collections.abc
import dataclasses
import decimal
import difflib
import enum
import errno
import ipaddress
import math
import os
import re
import select
import socket
import stat
import tomllib
import typing

from .grammar import TOKEN
from .limits import Bound, Limit
from .masking import mask_user, path_text

ENVIRONMENT_PREFIX = "PROXY_"

# poll(2) and TCP_USER_TIMEOUT count milliseconds in an int: 24.8 days. More would wrap, or be no limit at all.
LONGEST_S = 2_147_483
# TCP_USER_TIMEOUT takes whole milliseconds, and 0 would switch it off.
SHORTEST_S = 0.001
# sun_path holds 108 octets, the last of which is NUL (unix(7)).
_LONGEST_UNIX_PATH = 107
# Longer than any value that is meant, and short enough for one line on a screen.
_QUOTED_LENGTH = 120


class ConfigError(Exception):
    """What is wrong with the configuration: one line with option, value, source and how to mend it."""


@dataclasses.dataclass(frozen=True, slots=True)
class TcpAddress:
    """Where to listen. Port 0 lets the kernel choose."""

    host: str  # without brackets
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclasses.dataclass(frozen=True, slots=True)
class UnixAddress:
    """A unix socket to listen on."""

    path: str

    def __str__(self) -> str:
        return f"unix:{path_text(self.path)}"


@dataclasses.dataclass(frozen=True, slots=True)
class UpstreamUrl:
    """The upstream: ``host`` and ``port`` for ``http`` and ``https``, ``path`` of the socket for ``unix``."""

    scheme: str  # "http", "https" or "unix"
    host: str  # without brackets; empty for unix
    port: int  # 0 for unix
    path: str  # empty for http and https

    def __str__(self) -> str:
        if self.scheme == "unix":
            return f"unix:{'//' if self.path.startswith('/') else ''}{path_text(self.path)}"
        return f"{self.scheme}://{TcpAddress(self.host, self.port)}"


class Kind(enum.Enum):
    """How the text of a value is read, and what it becomes."""

    LISTEN = enum.auto()  # TcpAddress | UnixAddress
    UPSTREAM = enum.auto()  # UpstreamUrl
    WORKERS = enum.auto()  # int
    NUMBER = enum.auto()  # Bound
    SIZE = enum.auto()  # Bound
    SIZE_OR_NONE = enum.auto()  # Bound | None
    LIMIT = enum.auto()  # Limit | None
    SECONDS = enum.auto()  # float, 0 included
    CHOICE = enum.auto()  # str, one of Option.choices
    NAME = enum.auto()  # str, a token
    LOG_FILE = enum.auto()  # str, "-" is stderr
    PATH = enum.auto()  # str | None


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """One option. ``default`` is spelled as a user would spell it, and read the same way."""

    name: str  # "client_write_timeout"; its other spellings derive from it
    kind: Kind
    default: str
    metavar: str
    help: str
    group: str
    choices: tuple[str, ...] = ()
    shown_default: str = ""  # where the words of ``default`` would not explain it
    least: int = 1  # this and the next for WORKERS, NUMBER, SIZE and SIZE_OR_NONE
    most: int = 2**63 - 1

    @property
    def flag(self) -> str:
        """The spelling on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The spelling in the environment."""
        return ENVIRONMENT_PREFIX + self.name.upper()

    @property
    def described_default(self) -> str:
        """The default, in words where they say more."""
        return self.shown_default or self.default


_GENERAL = "General"
_TIMEOUTS = "Timeouts and deadlines"
_TLS = "TLS"

# A head is kept whole in memory for each connection, hence the most; less than the least would refuse real clients.
_LEAST_HEAD = 1024
_MOST_HEAD = 16 * 1024 * 1024


def _time_limit(name: str, default: str, text: str) -> Option:
    return Option(name, Kind.LIMIT, default, "S", text, _TIMEOUTS)


def _pem_file(name: str, metavar: str, text: str, shown_default: str = "") -> Option:
    return Option(name, Kind.PATH, "none", metavar, text + " (PEM)", _TLS, shown_default=shown_default)


# Every option there is, in the order of help, `check` and documents.
OPTIONS: tuple[Option, ...] = (
    Option(
        "listen",
        Kind.LISTEN,
        "127.0.0.1:8080",
        "HOST:PORT|unix:PATH",
        "where clients connect; port 0 picks a free port and server.start says which",
        _GENERAL,
    ),
    Option(
        "upstream",
        Kind.UPSTREAM,
        "unix:///var/run/docker.sock",
        "URL",
        "http://host:port, https://host:port or unix:///path/docker.sock; no path on the server",
        _GENERAL,
    ),
    Option(
        "workers",
        Kind.WORKERS,
        "auto",
        "N|auto",
        "processes that share the port; auto is one for each core",
        _GENERAL,
        shown_default="auto (cores)",
        most=1024,
    ),
    Option(
        "max_connections",
        Kind.NUMBER,
        "4096",
        "N",
        "client connections held at once, all workers together",
        _GENERAL,
        most=10_000_000,
    ),
    Option(
        "max_head_size",
        Kind.SIZE,
        "64KiB",
        "BYTES",
        "largest head of a request (431 if larger) or of a response",
        _GENERAL,
        least=_LEAST_HEAD,
        most=_MOST_HEAD,
    ),
    Option("max_body_size", Kind.SIZE_OR_NONE, "none", "BYTES", "largest request body (413 if larger)", _GENERAL),
    Option(
        "client_half_close",
        Kind.CHOICE,
        "abort",
        "abort|allow",
        "what a FIN from the client means while its response is pending",
        _GENERAL,
        choices=("abort", "allow"),
    ),
    Option(
        "proxy_name",
        Kind.NAME,
        "",
        "NAME",
        "names this deployment in Via and Proxy-Status",
        _GENERAL,
        shown_default="host name",
    ),
    Option(
        "log_file",
        Kind.LOG_FILE,
        "-",
        "PATH",
        "where the JSON lines go (- is stderr); reopened on SIGHUP and SIGUSR1",
        _GENERAL,
    ),
    Option(
        "log_level",
        Kind.CHOICE,
        "info",
        "LEVEL",
        "lowest level written: debug, info, warning or error",
        _GENERAL,
        choices=("debug", "info", "warning", "error"),
    ),
    Option("log_schema", Kind.CHOICE, "native", "native", "field names of the log", _GENERAL, choices=("native",)),
    Option(
        "config", Kind.PATH, "none", "FILE", "TOML file with these options, their names with _ in place of -", _GENERAL
    ),
    Option(
        "drain_timeout",
        Kind.SECONDS,
        "30",
        "S",
        "on SIGTERM, how long requests in flight may still take; 0 is not at all; a second SIGTERM ends now",
        _GENERAL,
    ),
    _time_limit("client_head_timeout", "10", "TLS handshake and request head, from its first byte to its last"),
    _time_limit("keepalive_timeout", "75", "client idle before the first byte of a request; its end is never an error"),
    _time_limit("client_read_timeout", "none", "no progress reading the request body"),
    _time_limit("client_read_deadline", "none", "the whole request, from the first byte of its head"),
    _time_limit("client_write_timeout", "none", "no progress writing the response to the client"),
    _time_limit(
        "client_write_deadline", "none", "the whole response, from the end of the request head (as Go's WriteTimeout)"
    ),
    _time_limit("upstream_connect_timeout", "10", "reaching upstream: name lookup, TCP connect, TLS handshake"),
    _time_limit("upstream_write_timeout", "none", "no progress writing the request to upstream"),
    _time_limit("upstream_write_deadline", "none", "writing the whole request to upstream, from connected"),
    _time_limit("upstream_head_timeout", "none", "from the request sent to the response head complete"),
    _time_limit("upstream_read_timeout", "none", "no progress reading the response body"),
    _time_limit("upstream_read_deadline", "none", "the whole response body, from the end of its head"),
    _time_limit("tunnel_timeout", "none", "no byte in either direction of an upgraded connection"),
    _time_limit(
        "peer_dead_timeout",
        "60",
        "the peer's kernel has answered nothing at all: data in flight or probes unacknowledged",
    ),
    _time_limit("tcp_user_timeout", "none", "the kernel's TCP_USER_TIMEOUT; also ends a reader that is merely paused"),
    _pem_file("tls_cert", "FILE", "serve HTTPS with this certificate chain"),
    _pem_file("tls_key", "FILE", "its key", "in --tls-cert"),
    _pem_file("tls_client_ca", "FILE", "require a client certificate of this CA"),
    _pem_file(
        "upstream_ca",
        "FILE|system",
        "CAs for the certificate of an https:// upstream, system is the OS store",
        "certifi's bundle",
    ),
    _pem_file("upstream_cert", "FILE", "client certificate for an https:// upstream"),
    _pem_file("upstream_key", "FILE", "its key", "in --upstream-cert"),
)

_BY_NAME = {option.name: option for option in OPTIONS}
# Named in the documents of this version as still to come: an error that says so is kinder than "unknown".
_NOT_YET = frozenset(
    (
        "auth_file",
        "allow",
        "rate_limit",
        "max_inflight_per_client",
        "proxy_protocol",
        "admin",
        "upstream_wait",
        "spawn",
        "exit_when_idle",
    )
)
_LATER_CHOICES = {"log_schema": ("ecs", "otel")}


# With a keepalive_timeout below this, a connection is accepted at once.
_MIN_IDLE_S = 10.0


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """The effective value of every option. Built once and shared by all threads.

    A time limit or a bound that is off is None. ``sources`` says for each option where its value was set.
    """

    listen: TcpAddress | UnixAddress
    upstream: UpstreamUrl
    workers: int
    max_connections: Bound
    max_head_size: Bound
    max_body_size: Bound | None
    client_half_close: str  # "abort" or "allow"
    proxy_name: str
    log_file: str  # "-" is stderr
    log_level: str
    log_schema: str
    config: str | None
    drain_timeout: float  # seconds; 0 waits for nothing
    client_head_timeout: Limit | None
    keepalive_timeout: Limit | None
    client_read_timeout: Limit | None
    client_read_deadline: Limit | None
    client_write_timeout: Limit | None
    client_write_deadline: Limit | None
    upstream_connect_timeout: Limit | None
    upstream_write_timeout: Limit | None
    upstream_write_deadline: Limit | None
    upstream_head_timeout: Limit | None
    upstream_read_timeout: Limit | None
    upstream_read_deadline: Limit | None
    tunnel_timeout: Limit | None
    peer_dead_timeout: Limit | None
    tcp_user_timeout: Limit | None
    tls_cert: str | None
    tls_key: str | None  # None: in tls_cert
    tls_client_ca: str | None
    upstream_ca: str | None  # None: certifi's; "system": the OS store
    upstream_cert: str | None
    upstream_key: str | None  # None: in upstream_cert
    sources: dict[str, str]

    @property
    def allows_half_close(self) -> bool:
        """Whether a client that has ended its side still waits for its response."""
        return self.client_half_close == "allow"

    @property
    def defers_accept(self) -> bool:
        """Whether connections are accepted when their client has spoken, or after a second: not on a unix socket, which
        has no such thing, nor where that second would be much of the time that a client may be idle.
        """
        idle = self.keepalive_timeout
        return isinstance(self.listen, TcpAddress) and (idle is None or idle.seconds >= _MIN_IDLE_S)

    @property
    def dead_peer_limit(self) -> Limit | None:
        """The option behind the kernel's verdict ETIMEDOUT: the user timeout if set, else the one the keepalive probes
        follow.
        """
        return self.tcp_user_timeout or self.peer_dead_timeout

    def describe(self) -> dict[str, dict[str, object]]:
        """Say for JSON what every option is and where it was set.

        Returns: ``{"value": ..., "source": ...}`` for each name; seconds and bytes are numbers, what is off is None.
        """
        described: dict[str, dict[str, object]] = {}
        for option in OPTIONS:
            value: object = getattr(self, option.name)
            match value:
                case Limit():
                    value = value.seconds
                case Bound():
                    value = value.value
                case TcpAddress() | UnixAddress() | UpstreamUrl():
                    value = str(value)
                case str():
                    value = path_text(value)
                case _:
                    pass
            described[option.name] = {"value": value, "source": self.sources[option.name]}
        return described


class _BadValue(ValueError):
    """What is wrong with the text of a value; who catches it adds option, value, source, and a mend if it has none."""

    def __init__(self, problem: str, mend: str = "") -> None:
        super().__init__(problem)
        self.mend = mend


def load_settings(arguments: collections.abc.Sequence[str], environ: collections.abc.Mapping[str, str]) -> Settings:
    """Put flags, environment, the file that either names, and defaults together.

    ``arguments`` are flags only, without a command.
    Raises: ConfigError.
    """
    given = _read_environment(environ) | _read_flags(arguments)
    path = None
    if "config" in given:
        text, source = given["config"]
        path = _parse(_BY_NAME["config"], text, source)
        if path is not None:
            given = _read_file(path, source) | given
    values: dict[str, typing.Any] = {}
    sources: dict[str, str] = {}
    for option in OPTIONS:
        text, source = given.get(option.name, (option.default, "default"))
        values[option.name] = _parse(option, text, source)
        sources[option.name] = source
    settings = Settings(**values, sources=sources)
    _check_together(settings)
    return settings


# -- where values come from: name -> (text, source) ------------------------------------------------------------------


def _read_flags(arguments: collections.abc.Sequence[str]) -> dict[str, tuple[str, str]]:
    given: dict[str, tuple[str, str]] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--") or argument == "--":
            raise ConfigError(
                f"unexpected argument {_quoted(argument)}: options are --name VALUE or --name=VALUE,"
                " and a command comes first"
            )
        flag, equals, text = argument.partition("=")
        name = flag[2:].replace("-", "_")
        option = _BY_NAME.get(name)
        if option is None or "_" in flag:
            value = text if equals else rest[0] if rest and not rest[0].startswith("--") else None
            known = [known.flag for known in OPTIONS]
            raise ConfigError(_unknown(flag, value, "flag", name, known, flag.replace("_", "-")))
        if not equals:
            # A value may begin with one hyphen (--log-file -), but the next option is no value.
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"{option.flag} (flag): needs a value; write {option.flag} {option.metavar}")
            text = rest.pop(0)
        if name in given:
            raise ConfigError(
                f"{option.flag} (flag): given twice, {_shown(option, given[name][0])} and {_shown(option, text)};"
                " keep one of them"
            )
        given[name] = (text, "flag")
    return given


def _read_environment(environ: collections.abc.Mapping[str, str]) -> dict[str, tuple[str, str]]:
    given: dict[str, tuple[str, str]] = {}
    for variable, text in environ.items():
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        option = _BY_NAME.get(name)
        if option is not None and variable == option.variable:
            given[name] = (text, f"env:{variable}")
        elif _looks_like_option(name):
            known = [candidate.variable for candidate in OPTIONS]
            raise ConfigError(_unknown(variable, text, "environment", name, known, variable.upper()))
    return given


def ignored_variables(environ: collections.abc.Mapping[str, str]) -> list[str]:
    """Returns: the variables that begin with ``PROXY_`` and are taken for somebody else's.

    The prefix is not ours alone: Kubernetes sets ``PROXY_PORT`` for a service named "proxy", and other programs read
    ``PROXY_USER``.
    """
    ours = {option.variable for option in OPTIONS}
    return sorted(variable for variable in environ if variable.startswith(ENVIRONMENT_PREFIX) and variable not in ours)


def _looks_like_option(name: str) -> bool:
    """Whether an unknown variable must be meant for this program.

    So it is if it is a known name but for a few letters, or made of two or more words of option names.
    """
    if name in _BY_NAME or name in _NOT_YET or difflib.get_close_matches(name, _BY_NAME, n=1, cutoff=0.8):
        return True
    words = name.split("_")
    return len(words) > 1 and all(word in _OPTION_WORDS for word in words)


_OPTION_WORDS = frozenset(word for option in OPTIONS for word in option.name.split("_"))


# No configuration is as large; a device or a disk image is.
_LARGEST_FILE = 256 * 1024
_PIPE_PATIENCE_MS = 3000


def _read_file(path: str, source: str) -> dict[str, tuple[str, str]]:
    where = f"config {_quoted(path)} ({source})"
    try:
        octets = _read_patiently(path)
    except OSError as error:
        raise ConfigError(f"{where}: can't be read: {error.strerror}; check the path and its permissions") from error
    if len(octets) > _LARGEST_FILE:
        raise ConfigError(f"{where}: is larger than {_LARGEST_FILE:,} bytes; check that it is the right file")
    try:
        text = octets.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = octets[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"{where}: line {line} is not UTF-8; save it as UTF-8, or check that it is the right file"
        ) from error
    try:
        table = tomllib.loads(text, parse_float=_parse_float)
        repr(table)  # fails where an error message would: a hexadecimal number of any length is read, but not shown
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        # TOMLDecodeError says line and column.
        problem = " ".join(str(error).split()) or type(error).__name__
        mend = 'write lines such as name = "value"; all but plain numbers stand in quotes'
        if problem.startswith("Cannot overwrite"):
            mend = "an option is given twice; keep one of them"
        raise ConfigError(f"{where}: is not TOML: {problem[:200]}; {mend}") from error
    except ValueError as error:
        # What int() and repr() say of more than 4300 digits.
        raise ConfigError(f"{where}: holds a number of thousands of digits; write a shorter one") from error
    lines = _key_lines(text, where)
    given: dict[str, tuple[str, str]] = {}
    for name, value in table.items():
        place = f"file:{path_text(path)}:{lines[name]}"
        option = _BY_NAME.get(name)
        if option is None:
            if isinstance(value, dict):
                raise ConfigError(
                    f"{_quoted(name)} ({place}): is a table, and options stand at the top level;"
                    f" remove [{_cut(name)}], and write options without a dot"
                )
            raise ConfigError(_unknown(name, value, place, name.replace("-", "_"), list(_BY_NAME), name))
        if name == "config":
            raise ConfigError(
                f"config {_quoted(value)} ({place}): can't be set in the file itself;"
                f" use {option.flag} or {option.variable}"
            )
        given[name] = (_text_of(option, value, place), place)
    return given


def _read_patiently(path: str) -> bytes:
    """Returns: the octets of a file, at most one more than the largest has.

    Raises: OSError, also for a named pipe that nobody opens to write for a while. Whoever has opened it takes any time.
    """
    with open(path, "rb", buffering=0, opener=_open_at_once) as file:
        first: bytes | None = None
        if stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
            poller = select.poll()
            poller.register(file, select.POLLIN)
            if not poller.poll(_PIPE_PATIENCE_MS):
                first = file.read(1)  # None if there is a writer, such as that of <(ssh HOST cat FILE)
                if first == b"":
                    raise OSError(errno.ENXIO, "a named pipe that nobody writes to")
        os.set_blocking(file.fileno(), True)
        with open(file.fileno(), "rb", closefd=False) as whole:
            return (first or b"") + whole.read(_LARGEST_FILE + 1)


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _text_of(option: Option, value: object, source: str) -> str:
    """Returns: a TOML value as the text a flag would have."""
    match option.kind:
        case Kind.WORKERS | Kind.NUMBER | Kind.SIZE | Kind.SIZE_OR_NONE:
            wanted = "a whole number or a string"
            fits = isinstance(value, int | str)
        case Kind.LIMIT | Kind.SECONDS:
            wanted = "a number or a string"
            fits = isinstance(value, int | float | str)
        case Kind.LISTEN | Kind.UPSTREAM | Kind.CHOICE | Kind.NAME | Kind.LOG_FILE | Kind.PATH:
            wanted = "a string"
            fits = isinstance(value, str)
        case _:  # pragma: no cover - the type check proves it unreachable
            typing.assert_never(option.kind)
    if not fits or isinstance(value, bool):
        kind = _TOML_TYPES.get(type(value), "a date or time")
        shown = str(value).lower() if isinstance(value, bool) else _quoted(value)
        raise ConfigError(f"{option.name} {shown} ({source}): is {kind}, and must be {wanted}; {_example(option)}")
    if isinstance(value, float) and math.isfinite(value):
        # 1e-07 as 0.0000001: digits are what the parsers of text read, and rounding could make an off switch of it.
        return f"{decimal.Decimal(repr(value)):f}"
    return str(value)


_TOML_TYPES: dict[type, str] = {
    bool: "a truth value",
    int: "a whole number",
    float: "a number with a fraction",
    str: "a string",
    list: "an array",
    dict: "a table",
}


def _parse_float(text: str) -> float:
    """Returns: the number, but never 0 for what is only too small for a float: 0 would switch a limit off."""
    value = float(text)
    if value == 0 and re.match("[+-]?[0_.]*[1-9]", text):
        return math.copysign(math.ulp(0.0), value)
    return value


# No option takes a value as long; finding the end of one costs its length for each of its lines.
_MOST_LINES = 50


def _key_lines(text: str, where: str) -> dict[str, int]:
    """Find the line on which each top-level key of a valid TOML document stands, since tomllib does not tell.

    A statement of TOML ends with its line unless a string or array in it is still open. So the shortest run of lines
    that tomllib accepts, from where the last one ended, is one statement: no rule of quoting is repeated here.
    Raises: ConfigError for a statement of very many lines.
    """
    lines: dict[str, int] = {}
    pending = ""
    first = 1
    in_table = False
    for number, line in enumerate(text.split("\n"), start=1):
        if number - first >= _MOST_LINES:
            raise ConfigError(
                f"{where}: line {first} begins a value of more than {_MOST_LINES} lines; no option takes one: remove it"
            )
        pending += line + "\n"
        try:
            statement = tomllib.loads(pending)
        except tomllib.TOMLDecodeError:
            continue  # not whole yet; what is wrong in the file was found when it was read as a whole
        is_header = pending.lstrip(" \t").startswith("[")
        in_table = in_table or is_header
        if is_header or not in_table:
            for name in statement:
                lines.setdefault(name, first)
        pending = ""
        first = number + 1
    return lines


# -- from text to value ----------------------------------------------------------------------------------------------


def _parse(option: Option, text: str, source: str) -> typing.Any:
    """Returns: the value that ``option.kind`` promises. Raises: ConfigError."""
    try:
        if "\0" in text or (not text and source != "default"):
            raise _BadValue("holds a NUL character" if text else "is empty")
        return _parse_kind(option, text, source)
    except _BadValue as error:
        raise ConfigError(
            f"{option.name} {_shown(option, text)} ({source}): {error}; {error.mend or _example(option)}"
        ) from None


def _parse_kind(option: Option, text: str, source: str) -> typing.Any:
    match option.kind:
        case Kind.LISTEN:
            return _parse_listen(text)
        case Kind.UPSTREAM:
            return _parse_upstream(text)
        case Kind.WORKERS:
            return _available_cores() if text == "auto" else _parse_number(option, text)
        case Kind.NUMBER:
            return Bound(option.name, _parse_number(option, text), source)
        case Kind.SIZE:
            return Bound(option.name, _parse_size(option, text), source)
        case Kind.SIZE_OR_NONE:
            return None if text.lower() == "none" else Bound(option.name, _parse_size(option, text), source)
        case Kind.LIMIT:
            seconds = 0.0 if text.lower() == "none" else _parse_seconds(text)
            return Limit(option.name, seconds, source) if seconds else None
        case Kind.SECONDS:
            return _parse_seconds(text)
        case Kind.CHOICE:
            if text in _LATER_CHOICES.get(option.name, ()):
                raise _BadValue("is not available in this version")
            if text not in option.choices:
                raise _BadValue("is none of its values")
            return text
        case Kind.NAME:
            return _parse_name(text) if text else _host_name_token()
        case Kind.LOG_FILE:
            _encode_path(text)
            return text
        case Kind.PATH:
            _encode_path(text)
            return None if text == "none" else text
        case _:  # pragma: no cover - the type check proves it unreachable
            typing.assert_never(option.kind)


def _example(option: Option) -> str:
    """Returns: how a value of the option is written, as a mend."""
    match option.kind:
        case Kind.LISTEN:
            return "write HOST:PORT, such as 127.0.0.1:8080 or [::1]:8080, or unix:PATH"
        case Kind.UPSTREAM:
            return "write http://host:port, https://host:port or unix:///path"
        case Kind.WORKERS:
            return f"write a whole number from {option.least} to {option.most}, or auto"
        case Kind.NUMBER:
            return f"write a whole number from {option.least} to {option.most}"
        case Kind.SIZE:
            return f"write bytes, such as 65536, 64k or 64KiB, from {option.least} to {option.most}"
        case Kind.SIZE_OR_NONE:
            return "write bytes, such as 65536, 64k or 64KiB, or none to switch it off"
        case Kind.LIMIT:
            return "write seconds, such as 10 or 0.5, or with a unit (500ms, 10s, 5m, 1h), or none to switch it off"
        case Kind.SECONDS:
            return "write seconds, such as 10 or 0.5, or with a unit (500ms, 10s, 5m, 1h); 0 waits for nothing"
        case Kind.CHOICE:
            return f"write {' or '.join(option.choices)}"
        case Kind.NAME:
            return "write letters, digits and !#$%&'*+-.^_`|~ only, 255 at most"
        case Kind.LOG_FILE:
            return "write a path, or - for stderr"
        case Kind.PATH:
            return "write a path, or none"
        case _:  # pragma: no cover - the type check proves it unreachable
            typing.assert_never(option.kind)


def _available_cores() -> int:
    # Not os.cpu_count(): a container or taskset may leave us fewer.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_SECONDS = re.compile(r"(-?)([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?: ?(ms|s|m|h))?")
_SECONDS_PER_UNIT = {
    unit: decimal.Decimal(each) for unit, each in (("ms", "0.001"), ("s", 1), ("m", 60), ("h", 3600), (None, 1))
}


def _parse_seconds(text: str) -> float:
    match = _SECONDS.fullmatch(text)
    if match is None:
        raise _BadValue("is no number of seconds")
    minus, digits, unit = match.groups()
    if minus:
        raise _BadValue("must not be negative")
    seconds = float(decimal.Decimal(digits) * _SECONDS_PER_UNIT[unit])  # of floats, 700 ms are 0.7000000000000001 s
    if seconds > LONGEST_S:
        raise _BadValue(f"is more than the kernel can count, {LONGEST_S} s (24 days)")
    if 0 < seconds < SHORTEST_S or (seconds == 0 and digits.strip("0.")):
        raise _BadValue("is less than a millisecond")
    return seconds


_SIZE = re.compile(r"([0-9]{1,19})(?: ?(?:([kmg])(?:ib)?|b))?", re.IGNORECASE)
_SIZE_PER_UNIT = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3}


def _parse_size(option: Option, text: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None and text.startswith("-") and _SIZE.fullmatch(text[1:]) is not None:
        raise _BadValue("must not be negative")
    if match is None:
        raise _BadValue("is no number of bytes")
    size = int(match[1]) * _SIZE_PER_UNIT[(match[2] or "").lower()]
    if size < option.least:
        raise _BadValue(f"is less than {option.least} byte{'s' if option.least > 1 else ''}")
    if size > option.most:
        raise _BadValue(f"is more than {option.most} bytes")
    return size


def _parse_number(option: Option, text: str) -> int:
    if re.fullmatch("-[0-9]{1,19}", text) is not None:
        raise _BadValue("must not be negative")
    if re.fullmatch("[0-9]{1,19}", text) is None:
        raise _BadValue("is no whole number")
    if not option.least <= int(text) <= option.most:
        raise _BadValue(f"is not from {option.least} to {option.most}")
    return int(text)


def _parse_name(text: str) -> str:
    # Via takes a token as pseudonym (RFC 9110 §7.6.3). Whitespace or a comma in it would forge a further entry.
    if len(text) > 255 or not text.isascii() or TOKEN.fullmatch(text.encode("ascii")) is None:
        raise _BadValue("can't stand in Via")
    return text


def _host_name_token() -> str:
    """Returns: the host name with what Via does not take replaced: no name of a machine is a reason not to start."""
    return re.sub(r"[^!#$%&'*+\-.^_`|~0-9A-Za-z]", "-", socket.gethostname())[:255] or "proxy"


def _parse_listen(text: str) -> TcpAddress | UnixAddress:
    if text.startswith("unix:"):
        return UnixAddress(_parse_unix_path(text.removeprefix("unix:")))
    if "://" in text:
        raise _BadValue("is a URL", "write HOST:PORT without a scheme and a path, or unix:PATH")
    if text.startswith("/"):
        raise _BadValue("has no port", f"for a unix socket write unix:{_cut(text)}")
    host, colon, port = text.rpartition(":")
    if not colon and text.isdigit():
        raise _BadValue("has no host", _which_addresses(text))
    if not colon or text.endswith("]"):
        raise _BadValue("has no port", f"write {_cut(text)}:8080")
    if host in ("", "*"):
        raise _BadValue("names no address", _which_addresses(port))
    host = _parse_host(host)
    if re.fullmatch("[0-9.]+|.*:.*", host) and (ipaddress.ip_address(host).is_multicast or host == "255.255.255.255"):
        raise _BadValue("is an address that nobody can connect to", _which_addresses(port))
    return TcpAddress(host, _parse_port(port, least=0))


def _which_addresses(port: str) -> str:
    port = _cut(port)
    return f"write 127.0.0.1:{port} for this machine alone, 0.0.0.0:{port} or [::]:{port} for all addresses"


_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://([^/?#]*)([^?#]*)(.*)", re.DOTALL)
_DEFAULT_PORTS = {"http": 80, "https": 443, "tcp": 2375}


def _parse_upstream(text: str) -> UpstreamUrl:
    if text.startswith("unix:"):
        return UpstreamUrl("unix", "", 0, _parse_unix_path(text.removeprefix("unix:")))
    if "@" in text:
        raise _BadValue("holds a user name or password", "leave it out: it would not be sent")
    match = _URL.fullmatch(text)
    if match is None:
        mend = f"write unix://{_cut(text)}" if text.startswith("/") else f"write http://{_cut(text)}, or https://"
        slashes = re.match(r"(https?|tcp):/?(?!/)(?=\D|$)", text, re.IGNORECASE)
        if slashes is not None:
            raise _BadValue(
                "lacks two slashes", f"write {slashes[1].lower()}://{_cut(text[slashes.end() :]) or 'host:port'}"
            )
        raise _BadValue("has no scheme", mend)
    scheme, authority, path, rest = match.groups()
    scheme = scheme.lower()
    if scheme not in _DEFAULT_PORTS:
        raise _BadValue(f"has the scheme {_cut(scheme)}")
    if path not in ("", "/") or rest:
        what = "a path" if path not in ("", "/") else "a query or fragment"
        raise _BadValue(f"has {what}", "leave it out: request targets go through unchanged")
    host, colon, port = authority.rpartition(":")
    if not colon or authority.endswith("]"):
        host, port = authority, str(_DEFAULT_PORTS[scheme])
    if not host:
        raise _BadValue("has no host")
    # tcp:// is how DOCKER_HOST spells it.
    return UpstreamUrl("http" if scheme == "tcp" else scheme, _parse_host(host), _parse_port(port, least=1), "")


def _parse_host(text: str) -> str:
    """Returns: the host without brackets."""
    if text.startswith("[") and text.endswith("]"):
        try:
            return str(ipaddress.IPv6Address(text[1:-1]))
        except ValueError:
            raise _BadValue(f"holds {_quoted(text)}, which is no IPv6 address") from None
    if text.count(":") > 1:
        raise _BadValue("holds an IPv6 address without brackets", "write it as in [::1]:8080")
    if re.fullmatch("[0-9.]+", text):
        try:
            return str(ipaddress.IPv4Address(text))
        except ValueError:
            raise _BadValue(f"holds {_quoted(text)}, which is no IPv4 address") from None
    if re.fullmatch(r"[A-Za-z0-9_](?:[A-Za-z0-9_.\-]*[A-Za-z0-9_.])?", text) is None or ".." in text:
        raise _BadValue(f"holds {_quoted(text)}, which is no host name")
    if len(text) > 253 or max(len(label) for label in text.split(".")) > 63:
        # RFC 1035 §2.3.4; the resolver's encoding fails on them.
        raise _BadValue(
            f"holds {_quoted(text)}, which is too long for a host name", "DNS takes 253 octets, and 63 between two dots"
        )
    return text


def _parse_port(text: str, least: int) -> int:
    if re.fullmatch("[0-9]{1,5}", text) is None or not least <= int(text) <= 65535:
        raise _BadValue(f"has the port {_quoted(text)}", f"write a port from {least} to 65535")
    return int(text)


def _encode_path(text: str) -> bytes:
    try:
        return os.fsencode(text)
    except UnicodeEncodeError:
        raise _BadValue("can't be a path in this locale", "set LC_ALL=C.UTF-8, or use ASCII alone") from None


def _parse_unix_path(text: str) -> str:
    if text.startswith("//"):
        # unix://var/run/docker.sock names the host "var".
        if not text.startswith("///"):
            if "@" in text[2:].partition("/")[0]:
                raise _BadValue("holds a user name or password", "write unix:///PATH, with three slashes")
            raise _BadValue("has a host", f"write unix:///{_cut(text[2:])}, with three slashes")
        text = text[2:]
    if not text or text.endswith("/"):
        raise _BadValue("names no socket", f"write unix:{_cut(text) or '/run/'}NAME.sock")
    length = len(_encode_path(text))
    if length > _LONGEST_UNIX_PATH:
        raise _BadValue(f"is a path of {length} octets, and the kernel takes {_LONGEST_UNIX_PATH}", "use a shorter one")
    return text


def _check_together(settings: Settings) -> None:
    """Refuse options that have no meaning without another. Raises: ConfigError."""
    needed = (
        ("tls_key", settings.tls_key, "tls_cert", settings.tls_cert),
        ("tls_client_ca", settings.tls_client_ca, "tls_cert", settings.tls_cert),
        ("upstream_key", settings.upstream_key, "upstream_cert", settings.upstream_cert),
    )
    for name, value, other, other_value in needed:
        if value is not None and other_value is None:
            flag = _BY_NAME[other].flag
            raise ConfigError(
                f"{name} {_quoted(value)} ({settings.sources[name]}): has no meaning without {flag}; set {flag} too"
            )
    if _is_itself(settings.listen, settings.upstream):
        raise ConfigError(
            f"upstream {str(settings.upstream)!r} ({settings.sources['upstream']}): is where the proxy itself listens,"
            f" listen {str(settings.listen)!r} ({settings.sources['listen']});"
            " name the server behind it, or listen elsewhere"
        )
    if settings.upstream.scheme == "https":
        return
    for name, value in (("upstream_ca", settings.upstream_ca), ("upstream_cert", settings.upstream_cert)):
        if value is not None:
            raise ConfigError(
                f"{name} {_quoted(value)} ({settings.sources[name]}): has no meaning for"
                f" upstream {str(settings.upstream)!r} ({settings.sources['upstream']});"
                f" set an https:// upstream, or leave {_BY_NAME[name].flag} out"
            )


def _is_itself(listen: TcpAddress | UnixAddress, upstream: UpstreamUrl) -> bool:
    """Whether each request would come back, and go round until its fields are too many."""
    if isinstance(listen, UnixAddress):
        return upstream.scheme == "unix" and os.path.realpath(listen.path) == os.path.realpath(upstream.path)
    if upstream.scheme == "unix" or listen.port != upstream.port:
        return False
    # Not by looking names up: that is for the time when the address is wanted.
    reached = {"": ("127.0.0.1", "::1"), "0.0.0.0": ("127.0.0.1",), "::": ("127.0.0.1", "::1")}
    reached["localhost"] = ("127.0.0.1", "::1")  # RFC 6761 §6.3
    here = {listen.host.lower(), *reached.get(listen.host.lower(), ())}
    return not here.isdisjoint((upstream.host.lower(), *reached.get(upstream.host.lower(), ())))


# -- words of errors -------------------------------------------------------------------------------------------------


def _cut(text: str) -> str:
    """Returns: ``text`` as it is, if it is short and printable, else as much of it as fits, escaped."""
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= _QUOTED_LENGTH else text[:_QUOTED_LENGTH] + "..."


def _quoted(value: object) -> str:
    text = mask_user(repr(value))
    return text if len(text) <= _QUOTED_LENGTH else text[:_QUOTED_LENGTH] + "..."


def _shown(option: Option | None, text: str) -> str:
    # A password someone put into the URL stays out of journals.
    is_url = option is None or option.kind is Kind.UPSTREAM
    return _quoted(re.sub(r"^[^/].*@", "***@", mask_user(text)) if is_url else text)


def _unknown(option: str, value: object, source: str, name: str, spellings: list[str], asked: str) -> str:
    """Returns: the error for an option that is none, with the value that was to be set, if any."""
    shown = "" if value is None else " " + (_shown(None, value) if isinstance(value, str) else _quoted(value))
    what = f"option {_quoted(option)}{shown} ({source})"
    if name in _NOT_YET:
        return f"{what}: is not available in this version; leave it out"
    close = difflib.get_close_matches(asked, spellings, n=1)
    return f"{what}: unknown; " + (f"did you mean {close[0]}?" if close else "--help lists the options")
