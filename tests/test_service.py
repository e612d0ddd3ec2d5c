"""``scripts/install`` and the systemd service it makes, on throw-away machines with a systemd of their own."""

import collections.abc
import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import re
import stat
import subprocess
import tomllib

import pytest

import machines
from harness import ROOT, wait_until
from proxy.config import OPTIONS, Kind, load_settings

_missing = machines.missing_parts()
pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(_missing is not None, reason=f"no throw-away machine here: {_missing}"),
]

INSTALL = "/root/checkout/scripts/install"
CONFIG = "/etc/abort-proxy/config.toml"
PROGRAM = "/usr/local/lib/abort-proxy/proxy.py"
UNIT = "/etc/systemd/system/abort-proxy.service"

# Stands for dockerd: its socket belongs to root and the group docker, and it answers everything.
_DAEMON = """
import grp, http.server, os, socketserver
class Server(socketserver.ThreadingUnixStreamServer): pass
class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def address_string(self): return "proxy"
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "2"); self.end_headers(); self.wfile.write(b"OK")
server = Server("/run/docker.sock", Answer)
os.chown("/run/docker.sock", 0, grp.getgrnam("docker").gr_gid)
os.chmod("/run/docker.sock", 0o660)
server.serve_forever()
"""
_ASK = """
import socket, sys
address = sys.argv[1]
sock = socket.socket(socket.AF_UNIX if address.startswith("/") else socket.AF_INET)
sock.settimeout(10)
sock.connect(address if address.startswith("/") else ("127.0.0.1", int(address)))
sock.sendall(b"GET /_ping HTTP/1.1\\r\\nHost: docker\\r\\nConnection: close\\r\\n\\r\\n")
answer = b""
while octets := sock.recv(65536):
    answer += octets
print(answer.decode())
"""


@pytest.fixture
def machine() -> collections.abc.Iterator[machines.Machine]:
    with machines.Machine() as machine:
        yield machine


def snapshot(machine: machines.Machine) -> dict[str, str]:
    """Returns: what is on the machine's disk, each path with its kind, owner, mode and content.

    Left out is what any program changes by running: caches, package lists and journals, and backups of passwd.
    """
    passing: tuple[str, ...] = (
        "/proc",
        "/sys",
        "/dev",
        "/run",
        "/tmp",
        "/var/cache",
        "/var/lib/apt",
        "/var/log",
        "/var/lib/dpkg",
    )
    passing += ("/var/lib/systemd", "/etc/ld.so.cache", "/root/checkout")
    backups = tuple(f"/etc/{name}-" for name in ("passwd", "group", "shadow", "gshadow"))
    root = machine.path("/")
    found = {}
    for directory, names, files in os.walk(root):
        here = "/" + os.path.relpath(directory, root).removeprefix(".")
        names[:] = [name for name in names if not os.path.join(here, name).startswith(passing)]
        for name in names + files:
            path = os.path.join(here, name)
            if path.startswith((*passing, *backups)):
                continue
            entry = os.lstat(root / path.lstrip("/"))
            what = f"{stat.filemode(entry.st_mode)} {entry.st_uid}:{entry.st_gid}"
            if stat.S_ISREG(entry.st_mode):
                what += " " + hashlib.sha256((root / path.lstrip("/")).read_bytes()).hexdigest()
            found[path] = what
    return found


def property_of(machine: machines.Machine, name: str) -> str:
    return machine.run("systemctl", "show", "--value", f"--property={name}", "abort-proxy").stdout.strip()


def journal(machine: machines.Machine) -> list[dict[str, object]]:
    """Returns: the proxy's records."""
    machine.run("journalctl", "--sync")
    said = machine.run("journalctl", "--unit=abort-proxy", "--output=cat", "--identifier=abort-proxy").stdout
    return [json.loads(line) for line in said.splitlines()]


def start_daemon(machine: machines.Machine) -> None:
    """Make the group docker, and a socket where dockerd's would be."""
    machine.run("groupadd", "--system", "docker", status=None)
    machine.path("/root/daemon.py").write_text(_DAEMON)
    machine.run("systemd-run", "--quiet", "--unit=daemon", "/usr/bin/python3", "/root/daemon.py")
    wait_until(lambda: machine.run("test", "-S", "/run/docker.sock", status=None).returncode == 0, 20, "the daemon")


def ask(machine: machines.Machine, address: str) -> str:
    return machine.run("/usr/bin/python3", "-c", _ASK, address).stdout


def test_from_nothing_to_a_service_and_back(machine: machines.Machine) -> None:
    machine.run("groupadd", "--system", "docker")
    before = snapshot(machine)

    told = machine.run(INSTALL, "--dry-run").stdout
    assert snapshot(machine) == before, "a dry run changed something"
    for what in ("packages python3", "make the user", f"write {CONFIG}", f"write {PROGRAM}", "enable", "start"):
        assert re.search(f"^install: would .*{re.escape(what)}", told, re.MULTILINE), what

    did = machine.run(INSTALL).stdout
    # The dry run told the truth: but for the check, which changes nothing, line for line.
    expected = [line.replace("would ", "") for line in told.splitlines() if "would check" not in line]
    assert [line for line in did.splitlines() if ": done;" not in line] == expected
    start_daemon(machine)
    answer = ask(machine, "2375")
    assert answer.startswith("HTTP/1.1 200 "), answer
    assert answer.endswith("OK\n"), answer

    # Who it is, and what it may.
    pid = property_of(machine, "MainPID")
    status = machine.path(f"/proc/{pid}/status").read_text()
    uid, gid = (machine.run("id", option, "abort-proxy").stdout.strip() for option in ("-u", "-g"))
    docker = machine.run("getent", "group", "docker").stdout.split(":")[2]
    assert re.search(f"^Uid:\t{uid}\t", status, re.MULTILINE)
    assert uid != "0"
    groups = re.search("^Groups:\t(.*)", status, re.MULTILINE)
    assert groups is not None
    assert set(groups[1].split()) == {gid, docker}
    assert re.search("^CapBnd:\t0+$", status, re.MULTILINE)
    assert re.search("^NoNewPrivs:\t1$", status, re.MULTILINE)
    assert re.search("^Seccomp:\t2$", status, re.MULTILINE)
    assert "TasksMax=16384" in machine.run("systemctl", "show", "abort-proxy").stdout

    # A second run touches nothing.
    installed = snapshot(machine)
    again = machine.run(INSTALL).stdout
    assert again == "install: nothing to do: all is in place\n"
    assert machine.run(INSTALL, "--dry-run").stdout.splitlines()[-1] == "install: nothing else to do: all is in place"
    assert snapshot(machine) == installed
    assert property_of(machine, "MainPID") == pid

    # A newer version comes in its place, and the configuration stays, that of how long logs are kept, too.
    config, rotation = machine.path(CONFIG), machine.path("/etc/logrotate.d/abort-proxy")
    config.write_text(config.read_text() + "client_write_timeout = 90\n")
    rotation.write_text(rotation.read_text().replace("rotate 14", "rotate 60"))
    program = machine.path("/root/checkout/proxy.py")
    program.write_text(program.read_text() + "\n# newer\n")
    upgraded = machine.run(INSTALL).stdout
    assert upgraded.splitlines()[:-1] == [f"install: bring up to date {PROGRAM}", "install: start the service"]
    assert machine.path(PROGRAM).read_text().endswith("# newer\n")
    assert config.read_text().endswith("client_write_timeout = 90\n")
    assert "rotate 60\n" in rotation.read_text()
    assert property_of(machine, "MainPID") != pid
    start = [record for record in journal(machine) if record["event"] == "server.start"][-1]
    settings = start["settings"]
    assert isinstance(settings, dict)
    source = f"file:{CONFIG}:{len(config.read_text().splitlines())}"
    assert settings["client_write_timeout"] == {"value": 90.0, "source": source}

    # It leaves no trace but what is the user's own.
    assert machine.run(INSTALL, "--uninstall", "--dry-run").stdout.count("would ") >= 10
    assert machine.run("systemctl", "is-active", "abort-proxy").stdout == "active\n"
    machine.run("systemctl", "stop", "daemon")
    machine.path("/root/daemon.py").unlink()
    machine.run(INSTALL, "--uninstall")
    assert snapshot(machine) == before
    assert not machine.path("/var/log/abort-proxy").exists()
    assert not machine.path("/run/abort-proxy").exists()
    assert machine.run("systemctl", "status", "abort-proxy", status=4).stderr.strip().endswith("could not be found.")
    assert "nothing to remove" in machine.run(INSTALL, "--uninstall").stdout


def make_package(machine: machines.Machine, name: str, fields: str = "") -> str:
    """Returns: the path of a new, empty package."""
    control = machine.path(f"/root/{name}/DEBIAN/control")
    control.parent.mkdir(parents=True)
    described = f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: test\nDescription: test\n"
    control.write_text(described + fields)
    machine.run("dpkg-deb", "--build", f"/root/{name}")
    return f"/root/{name}.deb"


def runs_apt(machine: machines.Machine) -> bool:
    """Returns: whether an apt-get that is to install packages runs there."""
    commands = []
    for path in machine.path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # has ended just now
            commands.append(path.read_bytes().split(b"\0"))
    return any(words[0] == b"apt-get" and b"install" in words and b"-s" not in words for words in commands)


def test_packages_that_others_asked_for_stay() -> None:
    with machines.Machine(booted=False) as machine:
        machine.run("groupadd", "--system", "docker")
        theirs = make_package(machine, "theirs")
        # Another one's apt is at work when ours comes, and brings a package.
        with machine.path("/var/lib/dpkg/lock-frontend").open("wb") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            process = machine.start(INSTALL)
            wait_until(lambda: runs_apt(machine), 20, "our apt-get")
            machine.run("dpkg", "--install", theirs, DPKG_FRONTEND_LOCKED="1")
        assert process.wait(60) == 0
        noted = machine.path("/var/lib/abort-proxy/made").read_text().splitlines()
        assert {"package python3", "package openssl"} <= set(noted)
        assert "package theirs" not in noted
        # Later somebody wants for himself what came along with ours.
        machine.run("apt-get", "-qq", "-y", "install", "openssl")
        said = machine.run(INSTALL, "--uninstall", "--dry-run").stdout
        removed = re.search("^install: would remove the packages (.*)$", said, re.MULTILINE)
        assert removed is not None, said
        assert "python3" in removed[1].split()
        assert not {"theirs", "openssl"} & set(removed[1].split())


def test_installed_after_plain_su_with_an_own_tmpdir() -> None:
    """Root's PATH is then that of a user, and with libpam-tmpdir nobody else may look below root's TMPDIR."""
    with machines.Machine(booted=False) as machine:
        machine.run("groupadd", "--system", "docker")
        machine.run("sh", "-c", "mkdir -m 711 /tmp/user && mkdir -m 700 /tmp/user/0")
        path = "/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games"
        # Where "cd scripts/.." would go first.
        cdpath = "/root/other:."
        machine.path("/root/other/scripts").mkdir(parents=True)

        def install(*arguments: str) -> str:
            # Not by exec, which would make an absolute path of it.
            shell = ("bash", "-c", 'cd /root/checkout && scripts/install "$@"', "install")
            return machine.run(*shell, *arguments, PATH=path, CDPATH=cdpath, TMPDIR="/tmp/user/0").stdout

        assert f"install: would write {PROGRAM}\n" in install("--dry-run")
        assert f"install: write {PROGRAM}\n" in install()


def test_what_is_the_users_survives(machine: machines.Machine) -> None:
    machine.path("/etc/abort-proxy").mkdir()
    machine.path(CONFIG).write_text('listen = "unix:/run/abort-proxy/http.sock"\n')
    machine.run("groupadd", "--system", "docker")
    machine.run("useradd", "--system", "--user-group", "abort-proxy")
    machine.run(INSTALL)
    start_daemon(machine)
    assert ask(machine, "/run/abort-proxy/http.sock").startswith("HTTP/1.1 200 ")
    machine.path("/etc/abort-proxy/server.key").write_text("secret")
    # A package that came with it, and that something else needs now.
    machine.run("dpkg", "--install", make_package(machine, "needs-urllib3", "Depends: python3-urllib3\n"))

    said = machine.run(INSTALL, "--uninstall").stdout
    assert machine.path(CONFIG).read_text() == 'listen = "unix:/run/abort-proxy/http.sock"\n'
    assert machine.path("/etc/abort-proxy/server.key").read_text() == "secret"
    machine.run("id", "abort-proxy")
    assert machine.run("id", "-nG", "abort-proxy").stdout == "abort-proxy\n", "it was not in the group docker before"
    assert re.search("kept: the packages .*python3-urllib3.* need them now: needs-urllib3", said)
    assert machine.run("python3", "-c", "import urllib3").stderr == ""
    assert not machine.path(PROGRAM).exists()


def test_the_service_reloads_restarts_and_rotates(machine: machines.Machine) -> None:
    machine.run("groupadd", "--system", "docker")
    machine.run(INSTALL)
    start_daemon(machine)
    pid = property_of(machine, "MainPID")
    config = machine.path(CONFIG)
    good = config.read_text()

    # A bad file is not reloaded, and what runs runs on.
    config.write_text(good + "client_write_timeot = 3\n")
    machine.run("systemctl", "reload", "abort-proxy", status=1)
    assert ask(machine, "2375").startswith("HTTP/1.1 200 ")
    assert not [record for record in journal_lines(machine) if "server.reload" in record]
    assert any("client_write_timeot" in line and "did you mean" in line for line in journal_lines(machine))
    config.write_text(good)
    machine.run("systemctl", "reload", "abort-proxy")
    wait_until(lambda: any("server.reload" in line for line in journal_lines(machine)), 10, "server.reload")
    assert property_of(machine, "MainPID") == pid

    # A crash is followed by a new start, a configuration that can't work is not.
    machine.run("sh", "-c", f"kill -KILL {pid}")
    wait_until(lambda: property_of(machine, "MainPID") not in (pid, "0"), 20, "the new process")
    wait_until(lambda: property_of(machine, "ActiveState") == "active", 20, "the new start")
    assert property_of(machine, "NRestarts") == "1"
    config.write_text("listen = 7\n")
    machine.run("systemctl", "restart", "abort-proxy", status=1)
    assert (property_of(machine, "ActiveState"), property_of(machine, "ExecMainStatus")) == ("failed", "2")

    # While it is down, a check as its user finds the place where its socket will be.
    config.write_text(good.replace("127.0.0.1:2375", "unix:/run/abort-proxy/http.sock"))
    as_user = ("setpriv", "--reuid=abort-proxy", "--regid=abort-proxy", "--init-groups")
    checked = machine.run(*as_user, "abort-proxy", "check", "--config", CONFIG).stdout
    assert re.search(f"^listen +unix:/run/abort-proxy/http.sock +file:{CONFIG}:", checked, re.MULTILINE), checked
    assert not machine.path("/run/abort-proxy/http.sock").exists()

    # A log in a file, rotated.
    config.write_text(good + 'log_file = "/var/log/abort-proxy/proxy.jsonl"\n')
    machine.run("systemctl", "restart", "abort-proxy")
    log = machine.path("/var/log/abort-proxy/proxy.jsonl")
    ask(machine, "2375")
    assert '"event":"request.complete"' in log.read_text()
    machine.run("logrotate", "--force", "/etc/logrotate.d/abort-proxy")
    wait_until(log.exists, 10, "the new log")
    ask(machine, "2375")
    wait_until(lambda: '"event":"request.complete"' in log.read_text(), 10, "a record in the new log")
    old = machine.path("/var/log/abort-proxy/proxy.jsonl.1").read_text()
    assert (old.count("request.complete"), log.read_text().count("request.complete")) == (1, 1)
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def journal_lines(machine: machines.Machine) -> list[str]:
    machine.run("journalctl", "--sync")
    return machine.run("journalctl", "--unit=abort-proxy", "--output=cat").stdout.splitlines()


def test_a_low_port_as_the_unit_explains_it(machine: machines.Machine) -> None:
    machine.run("groupadd", "--system", "docker")
    machine.run(INSTALL)
    start_daemon(machine)
    config = machine.path(CONFIG)
    config.write_text(config.read_text().replace("127.0.0.1:2375", "127.0.0.1:443"))
    machine.run("systemctl", "restart", "abort-proxy", status=1)
    drop_in = machine.path(f"{UNIT}.d")
    drop_in.mkdir()
    capability = "CAP_NET_BIND_SERVICE"
    (drop_in / "port.conf").write_text(
        f"[Service]\nAmbientCapabilities={capability}\nCapabilityBoundingSet={capability}\nPrivateUsers=no\n"
    )
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "restart", "abort-proxy")
    assert ask(machine, "443").startswith("HTTP/1.1 200 ")
    assert f"kept: {UNIT}.d" in machine.run(INSTALL, "--uninstall").stdout


def test_in_an_image_where_systemd_does_not_run() -> None:
    with machines.Machine(booted=False) as machine:
        machine.run("groupadd", "--system", "docker")
        before = snapshot(machine)
        said = machine.run(INSTALL).stdout
        assert "systemd does not run here" in said
        assert machine.path("/etc/systemd/system/multi-user.target.wants/abort-proxy.service").is_symlink()
        assert machine.run(INSTALL).stdout.endswith("nothing to do: all is in place\n")
        machine.run(INSTALL, "--uninstall")
        assert snapshot(machine) == before


# -- failures: each names its step, and leaves the user's things alone -------------------------------------------------


def failed(machine: machines.Machine, step: str) -> str:
    """Run the script, which must fail in ``step``. Returns: what it said on stderr."""
    done = machine.run(INSTALL, status=1)
    last = done.stderr.splitlines()[-1]
    assert re.fullmatch(f'install: step "{step}" failed \\(status \\d+\\); nothing after it was done', last), done
    return done.stderr


def test_no_way_to_the_packages(machine: machines.Machine) -> None:
    machine.run("groupadd", "--system", "docker")
    machine.forget_packages()
    before = snapshot(machine)
    assert "python3" in failed(machine, "packages")
    assert snapshot(machine) == before


def test_a_configuration_that_the_new_version_does_not_take(machine: machines.Machine) -> None:
    machine.run("groupadd", "--system", "docker")
    machine.run(INSTALL)
    pid = property_of(machine, "MainPID")
    machine.path(CONFIG).write_text('listen = "127.0.0.1:2375"\nclient_write_timeot = 3\n')
    program = machine.path("/root/checkout/proxy.py")
    program.write_text(program.read_text() + "\n# newer\n")
    before = snapshot(machine)
    said = failed(machine, "check of the configuration")
    assert "client_write_timeot" in said
    assert "did you mean" in said
    assert snapshot(machine) == before, "the old version was not left alone"
    assert property_of(machine, "MainPID") == pid
    # Mended and run again, it goes on.
    machine.path(CONFIG).write_text('listen = "127.0.0.1:2375"\nclient_write_timeout = 3\n')
    machine.run(INSTALL)
    assert property_of(machine, "MainPID") != pid


def test_a_certificate_that_the_service_may_not_read(machine: machines.Machine) -> None:
    machine.run("groupadd", "--system", "docker")
    machine.path("/etc/abort-proxy").mkdir()
    machine.path("/etc/abort-proxy/server.pem").write_text("secret")
    machine.path("/etc/abort-proxy/server.pem").chmod(0o600)
    machine.path(CONFIG).write_text('tls_cert = "/etc/abort-proxy/server.pem"\n')
    said = failed(machine, "check of the configuration")
    assert "/etc/abort-proxy/server.pem" in said
    assert "Permission denied" in said
    assert not machine.path(PROGRAM).exists()


def test_a_user_that_cannot_be_made(machine: machines.Machine) -> None:
    machine.path("/etc/passwd.lock").write_text("1")  # another useradd runs, it says
    before = snapshot(machine)
    failed(machine, "user")
    after = snapshot(machine)
    assert not machine.path(CONFIG).exists()
    assert before["/etc/passwd"] == after["/etc/passwd"]


@pytest.mark.parametrize(
    ("step", "in_the_way"), [("configuration", "/etc/abort-proxy"), ("program", "/usr/local/lib/abort-proxy")]
)
def test_a_file_where_a_directory_belongs(machine: machines.Machine, step: str, in_the_way: str) -> None:
    machine.path(in_the_way).write_text("the user's")
    failed(machine, step)
    assert machine.path(in_the_way).read_text() == "the user's"
    assert not machine.path(UNIT).exists()


def test_a_unit_that_cannot_be_written(machine: machines.Machine) -> None:
    machine.path(UNIT).mkdir()
    machine.path(f"{UNIT}/file").write_text("the user's")
    failed(machine, "service")
    assert machine.path(f"{UNIT}/file").read_text() == "the user's"


def test_the_port_is_taken(machine: machines.Machine) -> None:
    machine.run("groupadd", "--system", "docker")
    machine.path("/etc/systemd/system/taken.socket").write_text("[Socket]\nListenStream=127.0.0.1:2375\nAccept=yes\n")
    machine.path("/etc/systemd/system/taken@.service").write_text("[Service]\nExecStart=/bin/true\n")
    machine.run("systemctl", "start", "taken.socket")
    said = failed(machine, "start of the service")
    assert "another process listens there" in said
    assert property_of(machine, "ActiveState") == "failed"


def test_refusals(machine: machines.Machine) -> None:
    def refused(*command: str) -> str:
        done = machine.run(*command, status=2)
        assert done.stderr.startswith("install: refused: "), done
        return done.stderr

    before = snapshot(machine)
    assert "unknown argument '--dry'" in refused(INSTALL, "--dry")
    machine.run("chmod", "755", "/root")
    assert "run it as root" in refused("setpriv", "--reuid=1000", "--clear-groups", INSTALL)
    machine.run("chmod", "700", "/root")
    # Stands for a system with an older Python.
    python = machine.path("/usr/bin/python3")
    python.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.10.12\n')
    python.chmod(0o755)
    said = refused(INSTALL)
    assert "Python 3.10.12 on Debian GNU/Linux" in said
    assert "3.11 or newer" in said
    assert refused(INSTALL, "--dry-run") == said
    python.unlink()
    machine.path("/root/checkout/proxy.py").rename(machine.path("/root/elsewhere"))
    assert "scripts/amalgamate.py" in refused(INSTALL)
    machine.path("/root/elsewhere").unlink()
    for tool in ("systemctl", "apt-get"):
        os.rename(machine.path(f"/usr/bin/{tool}"), machine.path(f"/root/checkout/{tool}"))
    assert "no Debian or Ubuntu" in refused(INSTALL)
    os.rename(machine.path("/root/checkout/apt-get"), machine.path("/usr/bin/apt-get"))
    assert "no systemd" in refused(INSTALL)
    os.rename(machine.path("/root/checkout/systemctl"), machine.path("/usr/bin/systemctl"))
    assert snapshot(machine) == before


# -- the files themselves ----------------------------------------------------------------------------------------------


def test_the_unit_verifies_and_its_score_is_in_the_docs(machine: machines.Machine) -> None:
    machine.run(INSTALL)
    verified = machine.run("systemd-analyze", "verify", UNIT)
    assert (verified.stdout, verified.stderr) == ("", "")
    judged = machine.run("systemd-analyze", "security", "--offline=true", "--no-pager", UNIT).stdout
    score = re.search(r"Overall exposure level for abort-proxy.service: (\d+\.\d) (\w+)", judged)
    assert score is not None, judged
    assert f"{score[1]} {score[2]}" in (ROOT / "docs" / "vm.md").read_text()


def test_the_configuration_names_every_option_with_its_default(tmp_path: pathlib.Path) -> None:
    text = (ROOT / "deploy" / "config.toml").read_text()
    offered = {name: (mark, value) for mark, name, value in re.findall(r"^(# )?(\w+) = (.+)$", text, re.MULTILINE)}
    assert set(offered) == {option.name for option in OPTIONS} - {"config"}
    assert {name for name, (mark, _) in offered.items() if not mark} == {"listen", "upstream"}
    # With no mark before them, all are good TOML and say what holds without them.
    for option in OPTIONS:
        if option.name in ("config", "listen", "proxy_name", "log_file") or option.kind is Kind.PATH:
            continue
        path = tmp_path / f"{option.name}.toml"
        path.write_text(f"{option.name} = {offered[option.name][1]}\n")
        with_it = load_settings(["--config", str(path)], {}).describe()[option.name]["value"]
        assert with_it == load_settings([], {}).describe()[option.name]["value"], option.name
    assert tomllib.loads(re.sub("^# (?=[a-z_]+ = )", "", text, flags=re.MULTILINE))["tls_cert"]


def test_shell_scripts_are_sound() -> None:
    scripts = ["scripts/install", *(str(p.relative_to(ROOT)) for p in (ROOT / "deploy").glob("*.sh"))]
    done = subprocess.run(["shellcheck", *scripts], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
