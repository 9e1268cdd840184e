"""Two machines on one: processes in network and host name spaces of their own, joined by a cable."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

NAMES = ("mw-node0", "mw-node1")
ADDRESSES = ("10.213.7.1", "10.213.7.2")


@dataclass(frozen=True)
class Host:
    """What to put before a command to have it run there, its environment, and where rank 0 is."""

    prefix: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def separate(name: str, interface: str) -> Host:
    """A host with its own network and its own name."""
    command = ("ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", f'hostname {name}; exec "$@"', "sh")
    return Host(command, {"MASTER_ADDR": ADDRESSES[0], "GLOO_SOCKET_IFNAME": interface})


def build() -> list[Host]:
    """Lay the cable; OSError or CalledProcessError where that is not allowed."""
    for name in NAMES:
        ip("netns", "add", name)
    ip("link", "add", "mw-cable0", "netns", NAMES[0], "type", "veth", "peer", "mw-cable1", "netns", NAMES[1])
    for number, name in enumerate(NAMES):
        ip("-n", name, "addr", "add", f"{ADDRESSES[number]}/24", "dev", f"mw-cable{number}")
        for interface in (f"mw-cable{number}", "lo"):
            ip("-n", name, "link", "set", interface, "up")
    return [separate(name, f"mw-cable{number}") for number, name in enumerate(NAMES)]


@contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """Hosts whose processes meet only over the cable between them. Skips the test where that is not allowed."""
    try:
        hosts = build()
    except (OSError, subprocess.CalledProcessError) as error:
        hosts, problem = [], error
    try:
        if not hosts:
            pytest.skip(f"no network name spaces here: {problem}")
        yield hosts
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
