"""One sshd a host, with throw-away keys and a host name of its own.

The files that differ from the machine's (``/etc/hosts``, the client's configuration, the temporary folder) are mounted
over them in the host's own mount namespace; the machine's stay as they are.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cluster.network import tool
from benchmarks.cluster.requirements import program

_SERVER = """\
ListenAddress {address}
HostKey {folder}/server_key
AuthorizedKeysFile {folder}/client_key.pub
PidFile none
StrictModes no
UsePAM no
UseDNS no
PasswordAuthentication no
PermitRootLogin prohibit-password
MaxStartups 200
MaxSessions 200
PrintMotd no
SetEnv TMPDIR={folder}/tmp
"""

_CLIENT = """\
Host *
  IdentityFile {folder}/client_key
  IdentitiesOnly yes
  BatchMode yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""

_START = """\
set -e
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
mount --bind "$2/ssh_config" /etc/ssh/ssh_config
mount --bind "$2/$1/tmp" "$2/tmp"
exec "$3" -D -e -f "$2/$1/sshd_config"
"""


def address(number: int) -> str:
    """The address of host h1, h2, …"""
    return f"10.77.0.{number}"


def write_shared(folder: Path, hosts: Sequence[str]) -> None:
    """Write what all hosts have in common: keys, names, the client's configuration."""
    for key in ("server_key", "client_key"):
        tool("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
    lines = ["127.0.0.1 localhost", *(f"{address(number)} {host}" for number, host in enumerate(hosts, start=1))]
    (folder / "hosts").write_text("\n".join(lines) + "\n")
    (folder / "ssh_config").write_text(_CLIENT.format(folder=folder))
    (folder / "tmp").mkdir()
    for number, host in enumerate(hosts, start=1):
        (folder / host / "tmp").mkdir(parents=True)
        (folder / host / "sshd_config").write_text(_SERVER.format(folder=folder, address=address(number)))
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd refuses to start without it; the machine's own uses it too


def start(folder: Path, host: str, namespace: str) -> int:
    """Start a host's sshd in its network namespace, under its own name; returns the process id."""
    arguments = ("sh", "-c", _START, "sh", host, str(folder), program("sshd"))
    with (folder / host / "log").open("w") as log:
        process = subprocess.Popen(
            [program("ip"), "netns", "exec", namespace, program("unshare"), "--uts", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={"PATH": os.defpath + ":/usr/sbin:/sbin"},
        )
    return process.pid


def log(folder: Path, host: str) -> str:
    """What a host's sshd has said."""
    return (folder / host / "log").read_text().strip()
