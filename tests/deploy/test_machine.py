"""The units under systemd itself, with all that only it can do: dynamic users, mounts, credentials, filters.

A guest boots Debian with the units, the program and the example configuration where they belong. Its kernel attaches
to the services; images are read from its disk when it is off, by qemu-img.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.deploy.debian import NotPrepared
from tests.deploy.machine import Machine, make_root
from tests.deploy.manifests import ROOT
from tests.interop.samples import run_ok
from tests.support.peers import require_program

pytestmark = [
    pytest.mark.guest,
    pytest.mark.skipif(os.geteuid() != 0, reason="the machine's files belong to root"),
    pytest.mark.timeout(900),
]

TIMEOUT_S = 600.0
SIZE = 16 << 20
PATTERN_SIZE = 1 << 20
WRITTEN_OFFSET = 512 << 10
RESTARTED_OFFSET = 8 << 20
DYNAMIC_USERS = range(61184, 65520)
"""systemd's, see its documentation of UIDs and GIDs."""

TOKEN = "a-token-of-many-letters-and-digits-0123456789"
TOKEN_PLACE = "/run/credentials/nbdimg.service/admin.token"
CREDENTIAL = "[Service]\nLoadCredential=admin.token:/root/admin.token\n"
UNRESTRICTED = """\
[Service]
DynamicUser=no
User=root
CapabilityBoundingSet=~
LockPersonality=no
MemoryDenyWriteExecute=no
PrivateDevices=no
ProtectClock=no
ProtectHostname=no
ProtectKernelLogs=no
ProtectKernelModules=no
ProtectKernelTunables=no
ProtectSystem=no
RestrictAddressFamilies=
RestrictNamespaces=no
RestrictRealtime=no
RestrictSUIDSGID=no
SystemCallArchitectures=
SystemCallFilter=
"""
"""The control: what the checks must find missing."""

SCRIPT = f"""
attach() {{
    nbd-client -unix "$1" /dev/nbd0 -N "$2" -b 4096
    until test "$(cat /sys/block/nbd0/size)" = {SIZE // 512}; do sleep 0.1; done
}}
detach() {{
    nbd-client -d /dev/nbd0
    until test "$(cat /sys/block/nbd0/size)" = 0; do sleep 0.1; done
}}
head -c {PATTERN_SIZE} /dev/urandom > /pattern
report pattern "$(sha256sum < /pattern | cut -d " " -f 1)"

systemctl start nbdimg@disk
main=$(systemctl show --property=MainPID --value nbdimg@disk)
report status "$(tr '\\n\\t' ';:' < /proc/$main/status)"
attach /run/nbdimg-disk/nbd.sock disk
dd if=/pattern of=/dev/nbd0 bs=64k conv=fsync
detach
touch /etc/written
nsenter --target $main --mount touch /etc/written && report writes /etc || true
nsenter --target $main --mount touch /var/lib/nbdimg/written && report writes_state yes

systemctl start nbdimg@control
control=$(systemctl show --property=MainPID --value nbdimg@control)
report control_status "$(tr '\\n\\t' ';:' < /proc/$control/status)"
nsenter --target $control --mount touch /etc/written && report control_writes /etc || true
systemctl stop nbdimg@control

attach /run/nbdimg-disk/nbd.sock disk
rounds=0
while test ! -e /enough; do
    dd if=/pattern of=/dev/nbd0 bs=64k seek=$(({RESTARTED_OFFSET} >> 16)) oflag=direct || report error "$?"
    rounds=$((rounds + 1))
    report rounds $rounds
done &
for restart in 1 2; do
    sleep 2
    systemctl restart nbdimg@disk
    report restarted "$(journalctl --output=cat --unit=nbdimg@disk --grep=': attached to ' | wc -l)"
done
touch /enough
wait $!
report survived "$(tail -c +{RESTARTED_OFFSET + 1} /dev/nbd0 | head -c {PATTERN_SIZE} | sha256sum | cut -d " " -f 1)"
detach
main=$(systemctl show --property=MainPID --value nbdimg@disk)

kill -STOP $main
until test "$(systemctl show --property=NRestarts --value nbdimg@disk)" = 1; do sleep 0.5; done
until systemctl --quiet is-active nbdimg@disk; do sleep 0.5; done
attach /run/nbdimg-disk/nbd.sock disk
report read "$(head -c {PATTERN_SIZE} /dev/nbd0 | sha256sum | cut -d " " -f 1)"
detach
systemctl stop nbdimg@disk
report stopped "$(systemctl show --property=Result --value nbdimg@disk)"

systemctl start nbdimg.socket
systemctl --quiet is-active nbdimg && exit 9
attach /run/nbdimg.sock vm1
dd if=/pattern of=/dev/nbd0 bs=64k seek={WRITTEN_OFFSET >> 16} conv=fsync
report user "$(stat --format=%u /var/lib/private/nbdimg/vm1.qcow2)"
python3 - <<END
import http.client
connection = http.client.HTTPConnection("127.0.0.1", 9808)
connection.request("GET", "/v1/exports", headers={{"Authorization": "Bearer {TOKEN}"}})
with open("/proc/self/fd/3", "w") as control:
    print("api", connection.getresponse().status, sep="=", file=control)
END
sed -i "s/the installer's medium/another medium/" /etc/nbdimg/nbdimg.toml
echo 'unknown = 1' >> /etc/nbdimg/nbdimg.toml
systemctl reload nbdimg
until systemctl show --property=StatusText nbdimg | grep "nothing was reloaded"; do sleep 0.5; done
report refused "$(systemctl show --property=StatusText --value nbdimg)"
sed -i '$d' /etc/nbdimg/nbdimg.toml
systemctl reload nbdimg
while systemctl show --property=StatusText nbdimg | grep "nothing was reloaded"; do sleep 0.5; done
report status_text "$(systemctl show --property=StatusText --value nbdimg)"
report reloaded "$(journalctl --output=cat --unit=nbdimg --grep='reloaded: ' | tail -n 1)"
detach
systemctl stop nbdimg.socket nbdimg.service
report service "$(systemctl show --property=Result --value nbdimg)"
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The machine with raw images for the template and the three images of the example configuration."""
    root = tmp_path_factory.mktemp("machine") / "root"
    try:
        make_root(root)
    except NotPrepared as error:
        pytest.skip(str(error))
    images = root / "var/lib/nbdimg"
    images.mkdir()
    raw, qcow2 = ("disk.img", "control.img", "install.iso"), ("vm1.qcow2", "golden.qcow2")
    for name, kind in {**dict.fromkeys(raw, "raw"), **dict.fromkeys(qcow2, "qcow2")}.items():
        run_ok(require_program("qemu-img"), "create", "-q", "-f", kind, images / name, str(SIZE))
    configure(root)
    return root


def configure(root: Path) -> None:
    """The example configuration, with [admin] on, whose token only root can read."""
    text = (ROOT / "conf/nbdimg.toml").read_text()
    for line, wanted in {
        "#[admin]": "[admin]",
        '#listen = "127.0.0.1:9808"': 'listen = "127.0.0.1:9808"',
        '#token_file = "admin.token"': f'token_file = "{TOKEN_PLACE}"',
    }.items():
        assert text.count(line) == 1
        text = text.replace(line, wanted)
    (root / "etc/nbdimg").mkdir()
    (root / "etc/nbdimg/nbdimg.toml").write_text(text)
    token = root / "root/admin.token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    for unit, drop_in in {"nbdimg": CREDENTIAL, "nbdimg@control": UNRESTRICTED}.items():
        directory = root / f"etc/systemd/system/{unit}.service.d"
        directory.mkdir()
        (directory / "test.conf").write_text(drop_in)


@dataclass(frozen=True)
class Story:
    """What the script reported, the console's end, and the machine with its disk as it was left."""

    values: Mapping[str, str]
    console: str
    machine: Machine


@pytest.fixture(scope="module")
def story(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Story:
    machine = Machine(root, tmp_path_factory.mktemp("disk") / "disk")
    result = machine.run(SCRIPT, TIMEOUT_S)
    assert result.status == 0, result.console[-6000:]
    return Story(result.values, result.console[-6000:], machine)


def restrictions(status: str) -> set[str]:
    """What /proc/PID/status, as the script reports it, tells that a service has been denied."""
    fields = dict(line.split("::", 1) for line in status.split(";") if "::" in line)
    uids = {int(uid) for uid in (*fields["Uid"].split(":"), *fields["Gid"].split(":"))}
    capabilities = {int(fields[name], 16) for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")}
    found = {
        "another's files": len(uids) == 1 and uids <= set(DYNAMIC_USERS),
        "capabilities": capabilities == {0},
        "new privileges": fields["NoNewPrivs"] == "1",
        "system calls": int(fields["Seccomp_filters"]) > 1,
    }
    return {name for name, holds in found.items() if holds}


def test_service_is_a_dynamic_user_without_privileges_behind_a_filter(story: Story) -> None:
    everything = {"another's files", "capabilities", "new privileges", "system calls"}
    assert restrictions(story.values["status"]) == everything
    assert restrictions(story.values["control_status"]) == {"new privileges"}, "which the program itself renounces"
    assert "Seccomp_filters::1;" in story.values["control_status"], "its own"


def test_service_writes_in_its_state_directory_alone(story: Story) -> None:
    assert "writes" not in story.values
    assert story.values["control_writes"] == "/etc"
    assert story.values["writes_state"] == "yes"


def test_kernel_stays_attached_while_the_service_is_restarted(story: Story) -> None:
    assert "error" not in story.values
    assert story.values["restarted"] == "4"
    assert int(story.values["rounds"]) >= 2
    assert story.values["survived"] == story.values["pattern"]


def test_service_that_hangs_is_restarted_and_has_what_was_flushed(story: Story) -> None:
    assert story.values["read"] == story.values["pattern"]
    assert story.values["stopped"] == "success"


def test_socket_starts_the_service_whose_images_are_its_users(story: Story, tmp_path: Path) -> None:
    assert int(story.values["user"]) in DYNAMIC_USERS
    image, raw = story.machine.dump("/var/lib/private/nbdimg/vm1.qcow2", tmp_path / "vm1.qcow2"), tmp_path / "raw"
    run_ok(require_program("qemu-img"), "check", "-q", image)
    run_ok(require_program("qemu-img"), "convert", "-O", "raw", image, raw)
    content = raw.read_bytes()
    written = slice(WRITTEN_OFFSET, WRITTEN_OFFSET + PATTERN_SIZE)
    assert hashlib.sha256(content[written]).hexdigest() == story.values["pattern"]
    assert not any(content[: written.start])
    assert not any(content[written.stop :])


def test_service_reads_a_credential_that_only_root_can_read(story: Story) -> None:
    assert story.values["api"] == "200"


def test_reload_is_refused_with_a_reason_and_then_done(story: Story) -> None:
    assert "nbdimg.toml:" in story.values["refused"]
    assert "unknown: unknown key" in story.values["refused"]
    assert story.values["status_text"] == "serving 3 exports"
    assert json.loads(story.values["reloaded"])["message"] == "reloaded: 1 adjusted"
    assert story.values["service"] == "success"
