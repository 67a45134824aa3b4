"""A network namespace of the host: what a guest's network is tried against, without touching the host's own."""

from __future__ import annotations

import subprocess
from typing import Self

from vhostuser.tools.lab.errors import LabError


class Namespace:
    """A context manager: the namespace exists inside. It takes root (CAP_SYS_ADMIN, CAP_NET_ADMIN)."""

    def __init__(self, name: str, address: str) -> None:
        """address: ours in it, such as 10.0.0.1/24."""
        self.name = name
        self.address = address

    def __enter__(self) -> Self:
        _ip("netns", "add", self.name)
        try:
            _ip("-n", self.name, "link", "set", "lo", "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        _ip("netns", "delete", self.name)

    def command(self, *command: str) -> list[str]:
        """A command line that runs ``command`` in it."""
        return ["ip", "netns", "exec", self.name, *command]

    def run(self, *command: str, within: float = 60) -> str:
        """What the command says. Raises LabError."""
        done = subprocess.run(self.command(*command), capture_output=True, text=True, timeout=within)
        if done.returncode:
            raise LabError(f"{' '.join(command)}: status {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def address_to(self, interface: str) -> None:
        """Gives ``interface`` our address and brings it up."""
        _ip("-n", self.name, "address", "add", self.address, "dev", interface)
        _ip("-n", self.name, "link", "set", interface, "up")

    def bridge(self, name: str, *interfaces: str) -> None:
        """A bridge of these interfaces, which has our address."""
        _ip("-n", self.name, "link", "add", name, "type", "bridge")
        for interface in interfaces:
            _ip("-n", self.name, "link", "set", interface, "master", name, "up")
        self.address_to(name)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise LabError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
