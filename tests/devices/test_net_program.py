"""``vhostuser-net``: its own options, and ends that cannot be had. What all programs share: ``test_program``."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COMMAND = [sys.executable, "-m", "vhostuser.tools.net", "--socket-path=/nowhere/socket"]


def run(*arguments: str | bytes) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ([], 2, "required: --end"),
        (["--end=bridge"], 2, "only tap, stream, dgram, loopback, sink, source, peer, switch"),
        (["--end=switch:forever"], 2, "is not a number from 0 to 1000000"),
        (["--end=peer:x"], 2, "takes nothing behind it"),
        (["--end=peer"], 2, "joins two sockets, not 1"),
        (["--end=peer", "--socket-path=/nowhere/2", "--socket-path=/nowhere/3"], 2, "joins two sockets, not 3"),
        (["--end=tap:x", "--socket-path=/nowhere/2"], 2, "--end=tap is for one socket, not for 2"),
        (["--end=switch", "--socket-path=/nowhere/socket"], 2, "choose different paths"),
        (["--end=switch", "--socket-path=/nowhere/2", "--postcopy=always"], 2, "no postcopy"),
        (["--end=switch", "--socket-path=/nowhere/2", "--wake-socket=/nowhere/3"], 2, "no --wake-socket"),
        (["--end=switch", "--socket-path=/nowhere/2", "--fd=3"], 2, "not allowed with"),
        (["--end=sink", "--mac=52:54:00:00:00:01", "--mac=52:54:00:00:00:02"], 2, "2 of them for 1"),
        (["--end=switch", "--socket-path=/nowhere/2", *["--mac=52:54:00:00:00:01"] * 2], 2, "all different"),
        (["--end=switch", "--socket-path=/nowhere/2"], 1, "/nowhere/socket: No such file or directory"),
        (["--end=sink:x"], 2, "takes nothing behind it"),
        (["--end=source:13"], 2, "from 14 to 65557"),
        (["--end=tap:"], 2, "at most 15 bytes"),
        (["--end=tap:a/b"], 2, "at most 15 bytes"),
        (["--end=tap:" + "\u00e4" * 8], 2, "at most 15 bytes"),
        (["--end=stream:"], 2, "at most 107 bytes"),
        (["--end=stream:listen="], 2, "at most 107 bytes"),
        (["--end=stream:" + "x" * 108], 2, "at most 107 bytes"),
        (["--end=stream:/x", "--queue-pairs=2"], 1, "one connection is one queue pair, not 2"),
        (["--end=stream:listen=/nowhere/x"], 1, "/nowhere/x: No such file or directory"),
        (["--end=dgram:/x"], 2, "dgram:local=PATH,remote=PATH"),
        (["--end=dgram:local=/x,remote=" + "y" * 108], 2, "at most 107 bytes"),
        (["--end=dgram:local=/nowhere/x,remote=/y"], 1, "/nowhere/x: No such file or directory"),
        (["--end=tap:fd="], 2, "is not a number"),
        (["--end=tap:fd=99999999999"], 2, "is not a number"),
        (["--end=tap:fd=7,7"], 2, "a descriptor for each queue pair"),
        (["--end=tap:fd=900,901"], 1, "tap 900, 901: Bad file descriptor"),
        (["--end=tap:fd=0"], 1, "tap 0: "),
        (["--end=tap:fd=900,901", "--queue-pairs=3"], 1, "3 queue pairs, but 2 descriptors"),
        (["--end=sink", "--queue-pairs=129"], 2, "1 to 128"),
        (["--end=sink", "--mac=01:00:00:00:00:00"], 2, "one station"),
        (["--end=sink", "--pcap=/nowhere/x"], 1, "capture /nowhere/x: No such file or directory"),
        (["--end=sink", "--pcap=/nowhere/x", "--pcap-snaplen=13"], 2, "14 to 65557"),
        (["--end=sink", "--mtu=67"], 2, "68 to 65535"),
        (["--end=sink"], 1, "/nowhere/socket: No such file or directory"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(arguments: list[str], status: int, said: str) -> None:
    ended = run(*arguments)
    assert (ended.returncode, ended.stderr.count("\n"), ended.stdout) == (status, 1, ""), ended.stderr
    assert ended.stderr.startswith("vhostuser-net: ")
    assert said in ended.stderr


def test_a_name_that_is_no_text_is_a_name() -> None:
    """Interfaces are named by bytes. With rights it is made and goes with the process, without it is refused."""
    ended = run(os.fsencode("--end=tap:") + b"vu\xff")
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1), ended.stderr
