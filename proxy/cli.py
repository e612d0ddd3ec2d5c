"""The command line: which command was asked for, and what it prints.

Options are ``config``'s, serving is ``workers``'. Whatever is wrong before serving begins is one line on stderr and
exit status 2, never a traceback.
"""

import difflib
import importlib
import importlib.metadata
import json
import os
import shutil
import signal
import sys
import textwrap
import typing

from . import __version__
from .config import OPTIONS, ConfigError, Settings, UnixAddress, load_settings
from .demo import end_in_order_on_signals, run_demo, show
from .dependencies import DEPENDENCIES, ORDERS, open_standard_files, print_line
from .masking import mask_user
from .notes import configuration_notes
from .tls import read_contexts
from .workers import check_listen, check_log_file, serve

COMMANDS = {
    "serve": "serve until told to stop; the default",
    "check": "look at the configuration only: print each value with its source (--json for programs); exit 0 or 2",
    "demo": "show in 10 seconds what the proxy is for; needs no docker",
}
_LATER_COMMANDS = ("explain", "report")


def main(arguments: list[str]) -> int:
    """Run a command. ``arguments`` are those after the program's name. Returns: the exit status."""
    open_standard_files()
    try:
        return _run_command(arguments)
    except (ConfigError, OSError) as error:
        # One line, whatever a path or a system's message holds.
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(error))
        print_line(f"proxy: error: {line}")
        return 2
    except KeyboardInterrupt:
        return 130  # as a shell counts SIGINT


def main_exit() -> typing.NoReturn:
    """Run the command that ``sys.argv`` names, and end the process."""
    sys.exit(main(sys.argv[1:]))


def _run_command(arguments: list[str]) -> int:
    if "--help" in arguments or "-h" in arguments:
        return _write_out(help_text(min(100, shutil.get_terminal_size().columns)))
    if "--version" in arguments:
        return _write_out(version_text())
    command, options = "serve", arguments
    if arguments and not arguments[0].startswith("-"):
        command, *options = arguments
    if command != "serve":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ORDERS)  # serve does so when it can hear them
    match command:
        case "serve":
            return serve(load_settings(options, os.environ))
        case "check":
            as_json = "--json" in options
            return _check([option for option in options if option != "--json"], as_json=as_json)
        case "demo":
            if options:
                raise ConfigError(f"demo {options[0]!r}: demo takes no options; leave it out")
            end_in_order_on_signals()
            try:
                return run_demo()
            except BrokenPipeError:
                return 1  # `demo | head`: nobody watches to the end
        case _:
            raise ConfigError(_unknown_command(command))


def _unknown_command(command: str) -> str:
    known = f"the commands are {', '.join(COMMANDS)}"
    if command in _LATER_COMMANDS:
        return f"command {command!r}: is not available in this version; {known}"
    close = difflib.get_close_matches(command, COMMANDS, n=1)
    guess = f"did you mean {close[0]}? " if close else ""
    return f"command {mask_user(command)[:80]!r}: unknown; {guess}{known}, and options begin with --"


def _write_out(text: str) -> int:
    """Write to standard output. Returns: 0, also where the reader has left (``| head``). Raises: ConfigError."""
    try:
        show(text)
    except BrokenPipeError:
        return 0
    return 0


def help_text(width: int) -> str:
    """Returns: what ``--help`` prints, made from the option table."""
    lines = [
        "usage: proxy [COMMAND] [OPTION ...]",
        "",
        "A reverse proxy for HTTP/1.1 that never swallows an abort: one JSON record for every request.",
        "",
        "Commands:",
    ]
    for command, text in COMMANDS.items():
        lines += _entry(command, text, width)
    lines += _entry("--help, --version", "print this, or the version and the file it runs from", width)
    group = None
    for option in OPTIONS:
        if option.group != group:
            group = option.group
            lines += ["", f"{group}:"]
        lines += _entry(f"{option.flag} {option.metavar}", f"{option.help} (default {option.described_default})", width)
    notes = (
        "An option may be written --name VALUE or --name=VALUE, once. It can also be set by an environment variable"
        " (PROXY_ and its name in capitals, PROXY_CLIENT_WRITE_TIMEOUT) and in the TOML file of --config"
        " (client_write_timeout = 10). A flag beats the environment, which beats the file.",
        "S is seconds, fractions allowed, or with a unit: 500ms, 10s, 5m, 1h; 0 or none switches a limit off (of"
        " --drain-timeout, 0 ends all at once)."
        " BYTES is a number, or with a unit: 64k, 64KiB, 1MiB, 2GiB, all powers of 1024.",
    )
    for note in notes:
        lines += ["", *textwrap.wrap(note, width)]
    return "\n".join(lines) + "\n"


_INDENT = 28


def _entry(term: str, text: str, width: int) -> list[str]:
    wrapped = textwrap.wrap(text, max(30, width - _INDENT), break_on_hyphens=False)
    first = f"  {term}"
    if len(first) > _INDENT - 2:
        return [first, *(" " * _INDENT + line for line in wrapped)]
    return [first.ljust(_INDENT) + wrapped[0], *(" " * _INDENT + line for line in wrapped[1:])]


def version_text() -> str:
    """Returns: versions of the proxy, of Python and of what it stands on, and the file that runs.

    The file tells this proxy from the other package whose import name is proxy.
    """
    path = os.path.abspath(main.__code__.co_filename)
    python = ".".join(str(number) for number in sys.version_info[:3])
    lines = [f"abort-proxy {__version__}", f"file {path}", f"python {python} ({sys.executable})"]
    lines += [f"{package} {_package_version(module, package)}" for module, _, package in DEPENDENCIES]
    return "\n".join(lines) + "\n"


def _package_version(module: str, package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        # Bundled as plain files, without the installer's notes.
        return str(getattr(importlib.import_module(module), "__version__", "of unknown version"))


def _check(options: list[str], *, as_json: bool) -> int:
    settings = load_settings(options, os.environ)
    read_contexts(settings)
    _check_places(settings)
    described = settings.describe()
    notes = configuration_notes(settings, os.environ)
    if as_json:
        return _write_out(json.dumps({"version": __version__, "settings": described, "notes": notes}, indent=2) + "\n")
    rows = [("option", "value", "source")]
    rows += [(name, _spelled(entry["value"]), str(entry["source"])) for name, entry in described.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = [f"{name.ljust(widths[0])}  {value.ljust(widths[1])}  {source}" for name, value, source in rows]
    lines += ["", *(f"note: {note}" for note in notes), "The configuration is good."]
    return _write_out("\n".join(lines) + "\n")


def _spelled(value: object) -> str:
    """Returns: a value of ``Settings.describe`` as a user would write it, in printable characters."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.6f}".rstrip("0").rstrip(".")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(value))


def _check_places(settings: Settings) -> None:
    """Find out whether the log and the listener can be made where they are wanted, without making them.

    Raises: ConfigError.
    """
    if settings.log_file != "-" and not check_log_file(settings):
        where = f"log_file {settings.log_file!r} ({settings.sources['log_file']})"
        if settings.log_file.endswith("/"):
            raise ConfigError(f"{where}: Is a directory; name a file in it")
        _check_directory(where, os.path.realpath(settings.log_file))
    if isinstance(settings.listen, UnixAddress):
        _check_directory(f"listen {str(settings.listen)!r} ({settings.sources['listen']})", settings.listen.path)
    check_listen(settings)


def _check_directory(where: str, path: str) -> None:
    directory = os.path.dirname(path) or "."
    if not os.path.isdir(directory):
        raise ConfigError(f"{where}: {directory!r} is no directory; make it, or choose another path")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigError(f"{where}: {directory!r} may not be written; change its permissions, or choose another path")
