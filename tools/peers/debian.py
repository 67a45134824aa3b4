"""Programs of Debian: those that are installed, and those of another release, unpacked beside the system and run there.

What belongs here: packages. What is run from them: ``table``. Nothing is installed by this module and the system's own
lists of packages stay as they are: apt-get is told of directories of our own.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from vhostuser.tools.lab.errors import LabError

_SOURCE = """\
Types: deb
URIs: http://deb.debian.org/debian
Suites: {release}
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
"""
_CONFIGURATION = """\
Dir "{home}/apt";
Dir::State::status "{home}/apt/status";
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "{home}/apt/sources";
"""
_LIBRARIES = "usr/lib/x86_64-linux-gnu"


def installed(package: str) -> str:
    """The version of an installed package, empty if it is not."""
    query = ["dpkg-query", "--show", "--showformat=${db:Status-Status} ${Version}", package]
    status, _, version = subprocess.run(query, capture_output=True, text=True).stdout.partition(" ")
    return version if status == "installed" else ""


class Release:
    """Packages of one release of Debian, unpacked below ``home`` with everything that they depend on."""

    def __init__(self, name: str, home: Path) -> None:
        self._name = name
        self._home = home / name
        self._root = self._home / "root"
        self._stamp = self._home / "unpacked"

    def unpack(self, packages: list[str]) -> None:
        """Fetches and unpacks what is not there yet. Raises LabError."""
        if self._unpacked() == packages:
            return
        self._configure()
        self._apt("update")
        self._apt("install", "--yes", "--no-install-recommends", "--download-only", *packages)
        self._root.mkdir(exist_ok=True)
        for archive in sorted((self._home / "apt/var/cache/apt/archives").glob("*.deb")):
            _run("dpkg", "-x", str(archive), str(self._root))
        self._stamp.write_text(" ".join(packages))

    def has(self, package: str) -> bool:
        """Is it unpacked?"""
        return package in self._unpacked()

    def _unpacked(self) -> list[str]:
        return self._stamp.read_text().split() if self._stamp.exists() else []

    def _configure(self) -> None:
        apt = self._home / "apt"
        for directory in ("sources", "var/lib/apt/lists/partial", "var/cache/apt/archives/partial"):
            (apt / directory).mkdir(parents=True, exist_ok=True)
        (apt / "status").touch()
        (apt / "sources/release.sources").write_text(_SOURCE.format(release=self._name))
        (self._home / "apt.conf").write_text(_CONFIGURATION.format(home=self._home))

    def _apt(self, *arguments: str) -> None:
        _run("apt-get", "--quiet=2", *arguments, APT_CONFIG=str(self._home / "apt.conf"))

    def version(self, package: str) -> str:
        """Of an unpacked package."""
        (archive,) = (self._home / "apt/var/cache/apt/archives").glob(f"{package}_*.deb")
        return archive.name.split("_")[1].replace("%3a", ":")

    def command(self, command: str) -> str:
        """The command with its program taken from here, and with the C library that it was built for."""
        program, _, arguments = command.partition(" ")
        path = self._root / program.removeprefix("/")
        if not path.exists():
            path = self._root / "usr/bin" / program
        libraries = self._root / _LIBRARIES
        words = (str(libraries / "ld-linux-x86-64.so.2"), "--library-path", str(libraries), str(path))
        return f"{shlex.join(words)} {arguments}"


def _run(*command: str, **environment: str) -> None:
    if not shutil.which(command[0]):
        raise LabError(f"{command[0]} is missing: programs of other releases are fetched with Debian's package tools")
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        raise LabError(f"{' '.join(command)} failed: {done.stderr.strip()}")
