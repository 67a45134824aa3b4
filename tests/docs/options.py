"""Which options the documentation may name: those that a program or script of this tree has, and some of others."""

from __future__ import annotations

import contextlib
import io
import re

from tests.docs.blocks import ROOT
from vhostuser.tools.main import TOOLS, main

FOREIGN = frozenset(
    {
        *("--socket", "--image"),  # my-backend
        *("--silent", "--unix-socket"),  # curl
        # dpdk-testpmd
        *(
            "--auto-start",
            "--forward-mode",
            "--file-prefix",
            "--lcores",
            "--nb-cores",
            "--no-huge",
            "--no-pci",
            "--no-shconf",
        ),
        *("--socket-mem", "--stats-period", "--total-num-mbufs", "--vdev"),
        *("--blockdev", "--export"),  # qemu-storage-daemon
        *("--foreground", "--socket", "--tcp-ports"),  # passt
    }
)

_NAMED = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
_DEFINED = re.compile(r"[\"'](--[a-z][a-z0-9-]*)[\"']")
_CODE = re.compile(r"`([^`\n]+)`")


def named(page: str) -> set[str]:
    """The options in the inline code and the shell commands of a page."""
    return {option for code in _CODE.findall(page) for option in _NAMED.findall(code)}


def in_commands(text: str) -> set[str]:
    """The options in shell commands."""
    return set(_NAMED.findall(text))


def known() -> frozenset[str]:
    """Every option of every program and script of this tree: as help shows it, or quoted where a parser is made."""
    scripts = [ROOT / "tools/demo", ROOT / "tools/test", *ROOT.glob("tests/bench/*.py"), *ROOT.glob("tools/**/*.py")]
    return FOREIGN.union(
        *(_NAMED.findall(_help(tool)) for tool in TOOLS), *(_DEFINED.findall(path.read_text()) for path in scripts)
    )


def _help(tool: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        main([tool, "--help"])
    return said.getvalue()
