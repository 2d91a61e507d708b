"""What the machine must offer, and the Debian package of what it does not."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping

_PACKAGES = {
    "ip": "iproute2",
    "tc": "iproute2",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "nsenter": "util-linux",
    "unshare": "util-linux",
    "mount": "mount",
    "hostname": "hostname",
}
_COMPILER = {"g++": "g++"}
_SEARCH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"  # where Debian keeps sshd and tc


def program(name: str) -> str:
    """The full path of a program, which sshd insists on; its name where it is not installed."""
    return shutil.which(name, path=_SEARCH) or name


def missing(*, compiler: bool = False) -> list[str]:
    """What keeps this machine from running a cluster, one line each; empty when nothing does.

    Args:
        compiler: whether its links have delay: the switch that makes it is compiled on the spot.
    """
    if sys.platform != "linux":
        return [f"network namespaces are a feature of Linux, this is {sys.platform}"]
    lines = [] if os.geteuid() == 0 else ["network namespaces need root: run this as root"]
    needed = _PACKAGES | (_COMPILER if compiler else {})
    absent = {name: package for name, package in needed.items() if shutil.which(name, path=_SEARCH) is None}
    return lines + [f"{', '.join(names)} not found: apt-get install {package}" for package, names in _grouped(absent)]


def _grouped(packages: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    grouped: dict[str, list[str]] = {}
    for name, package in packages.items():
        grouped.setdefault(package, []).append(name)
    return sorted(grouped.items())
