"""``deploy/provision.sh``, which makes the demonstration VM, on a throw-away machine; docs/vm.md has it in a real one.

Stand-ins here are the packages: dockerd is a small server at its socket. The registry is Debian's own program.
"""

import os
import pathlib
import re
import shutil
import subprocess

import pytest

import machines
from harness import ROOT
from test_service import snapshot

_REGISTRY = "/usr/bin/docker-registry"


def _missing_parts() -> str | None:
    missing = machines.missing_parts()
    if missing is None and not os.path.exists(_REGISTRY):
        return "missing Debian packages: docker-registry"
    return missing


_missing = _missing_parts()
pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(_missing is not None, reason=f"no throw-away machine here: {_missing}"),
]

PROVISION = "/root/checkout/deploy/provision.sh"
LINK = "/usr/local/sbin/registry-link"
CONFIG = "/etc/abort-proxy/config.toml"

_DOCKERD = """#!/usr/bin/python3
import grp, http.server, os, socketserver
class Answer(http.server.BaseHTTPRequestHandler):
    def address_string(self): return "proxy"
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "2"); self.end_headers(); self.wfile.write(b"OK")
if os.path.exists("/run/docker.sock"): os.unlink("/run/docker.sock")
server = socketserver.UnixStreamServer("/run/docker.sock", Answer)
os.chown("/run/docker.sock", 0, grp.getgrnam("docker").gr_gid)
os.chmod("/run/docker.sock", 0o660)
server.serve_forever()
"""
_UNITS = {
    "docker": "[Service]\nExecStart=/usr/bin/dockerd\nExecReload=/bin/sh -c 'echo reload >>/run/reloads'\n",
    "docker-registry": f"[Service]\nUser=docker-registry\nExecStart={_REGISTRY} serve /etc/docker/none.yml\n",
}
# How long it took to send so many octets to the registry, or why it could not.
_UPLOAD = """
import sys, time, urllib.request
begun_at = time.monotonic()
def ask(method, url, body):
    fields = {"Content-Type": "application/octet-stream"}
    return urllib.request.urlopen(urllib.request.Request(url, body, fields, method=method), timeout=3).headers
try:
    place = ask("POST", "http://registry.test:5000/v2/trial/blobs/uploads/", b"")["Location"]
    ask("PATCH", place, b"x" * int(sys.argv[1]))
except OSError as error:
    sys.exit(str(error))
print(time.monotonic() - begun_at)
"""


def _install_stand_ins(machine: machines.Machine) -> None:
    """Have on the machine the packages that provisioning asks for, those that it lacks as stand-ins."""
    text = machine.path(PROVISION).read_text()
    wanted = re.search(r"packages=\(([^)]*)\)", text)
    assert wanted is not None
    for package, version in (word.split("=") for word in wanted[1].split()):
        if package == "iproute2":
            continue  # the machine has it
        made = f"/root/made/{package}"
        machine.path(f"{made}/DEBIAN").mkdir(parents=True)
        fields = f"Package: {package}\nVersion: {version}\nArchitecture: all\nMaintainer: test\nDescription: test\n"
        machine.path(f"{made}/DEBIAN/control").write_text(fields)
        machine.run("dpkg-deb", "--build", made)
        machine.run("dpkg", "--install", f"{made}.deb")
    shutil.copy(_REGISTRY, machine.path(_REGISTRY))
    for name in ("dockerd", "docker"):
        program = machine.path(f"/usr/bin/{name}")
        program.write_text(_DOCKERD)
        program.chmod(0o755)
    for name, unit in _UNITS.items():
        machine.path(f"/lib/systemd/system/{name}.service").write_text(f"{unit}[Install]\nWantedBy=multi-user.target\n")
    machine.run("groupadd", "--system", "docker")
    machine.run("useradd", "--system", "--home-dir", "/var/lib/docker-registry", "--create-home", "docker-registry")
    machine.run("apt-get", "-qq", "-y", "--no-install-recommends", "install", "python3")
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "docker")  # as its package does


def _upload_s(machine: machines.Machine, octets: int) -> float:
    return float(machine.run("python3", "-c", _UPLOAD, str(octets)).stdout)


def test_provisioning_twice_changes_nothing_and_the_link_obeys() -> None:
    with machines.Machine() as machine:
        _install_stand_ins(machine)
        first = machine.run(PROVISION).stdout.splitlines()
        assert first[-1] == "provision: done; the link to the registry is good"
        assert f"provision: write {CONFIG}" in first
        assert not [line for line in first if "note" in line and "iproute2" not in line]
        assert machine.path("/run/reloads").read_text() == "reload\n", "dockerd has not heard of the registry"

        # Also at an address that is not loopback, as forwarded ports come in.
        ask = "import urllib.request; print(urllib.request.urlopen('http://198.18.0.1:2375/version').read().decode())"
        assert machine.run("python3", "-c", ask).stdout == "OK\n"

        made = snapshot(machine)
        again = machine.run(PROVISION).stdout.splitlines()
        assert again[0] == "install: nothing to do: all is in place"
        assert again[-1] == "provision: nothing changed; the link to the registry is good"
        assert snapshot(machine) == made
        assert machine.run(PROVISION, "--wait").stdout == ""

        # 60 kB at 400 kbit/s are 1.2 s, of which 8 kB go at once.
        assert machine.run(LINK, "slow", "400kbit").stdout == "slow 400kbit\n"
        assert _upload_s(machine, 60_000) > 1.0
        assert machine.run(PROVISION).stdout.endswith("nothing changed; the link to the registry is slow 400kbit\n")
        assert machine.run(LINK, "dead").stdout == "dead\n"
        assert "timed out" in machine.run("python3", "-c", _UPLOAD, "1", status=1).stderr
        assert machine.run(LINK, "good").stdout == "good\n"
        assert _upload_s(machine, 60_000) < 1.0

        assert "not 'quick'" in machine.run(LINK, "slow", "quick", status=1).stderr
        assert "takes a figure" in machine.run(LINK, "lossy", status=1).stderr
        assert "registry-link dead" in machine.run(LINK, "ded", status=2).stderr
        assert machine.run(LINK).stdout == "good\n"

        # A link that was stopped, and a file that differs.
        made = snapshot(machine)
        machine.run("systemctl", "stop", "registry-link")
        assert machine.run(LINK).stdout == "down\n"
        assert "the link is down" in machine.run(LINK, "dead", status=1).stderr
        machine.path("/etc/docker/registry/demo.yml").write_text("version: 0.1\n")
        mended = machine.run(PROVISION).stdout.splitlines()
        assert mended[:2] == [
            "provision: write /etc/docker/registry/demo.yml",
            "provision: start the registry behind its link",
        ]
        assert snapshot(machine) == made
        assert _upload_s(machine, 1) < 3.0


def test_what_the_vm_is_made_of_is_sound() -> None:
    scripts = [PROVISION.removeprefix("/root/checkout/"), "deploy/vm/registry-link.sh"]
    for script in scripts:
        assert os.access(ROOT / script, os.X_OK), script
    done = subprocess.run(["shellcheck", *scripts], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    # The one address that is written in several places.
    for path in ("deploy/provision.sh", "deploy/vm/daemon.json", "Vagrantfile"):
        assert "registry.test" in pathlib.Path(ROOT / path).read_text(), path
