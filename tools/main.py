"""``vhostuser``: the tools, one subcommand each. The table below is all there is to adding one.

What belongs here: which tools there are, and the way into them. What does not: their options (each tool's own parser).
A tool is imported when it is asked for, so that the help needs nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Final, NamedTuple, NoReturn

PROGRAM = "vhostuser"


class Tool(NamedTuple):
    """A subcommand: the module whose ``main(program, arguments)`` gives the exit status, and a line for the help."""

    module: str
    summary: str


TOOLS: Final = {
    "conform": Tool("vhostuser.tools.conform", "try whether a back-end or a front-end keeps to the specification"),
    "doctor": Tool("vhostuser.tools.doctor", "say what this machine allows, and how to be allowed more"),
    "guest": Tool("vhostuser.tools.guest", "make a small Linux guest to try a device with"),
    "inflight": Tool("vhostuser.tools.inflight", "say what an in-flight region has, and what is wrong with it"),
    "postcopy": Tool("vhostuser.tools.postcopy.command", "try a back-end's postcopy on one machine, without a VM"),
    "trace": Tool("vhostuser.tools.trace.command", "sit between a front-end and a back-end and say what passes"),
}


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Ends the process: with the tool's status, or 2 for a tool that does not exist."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        sys.exit(0 if arguments else 2)
    name, *rest = arguments
    if name not in TOOLS:
        print(f"{PROGRAM}: there is no tool {name!r}, only {', '.join(TOOLS)} (see {PROGRAM} --help)", file=sys.stderr)
        sys.exit(2)
    run: Callable[[str, Sequence[str]], int] = import_module(TOOLS[name].module).main
    sys.exit(_piped(lambda: run(f"{PROGRAM} {name}", rest)))


def _piped(run: Callable[[], int]) -> int:
    """The status; 1 if whoever read our output has left."""
    try:
        status = run()
        sys.stdout.flush()
    except BrokenPipeError:
        # Else the interpreter would complain when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), sys.stdout.fileno())
        return 1
    return status


def _help() -> str:
    width = max(map(len, TOOLS)) + 2
    lines = [f"  {name:<{width}}{tool.summary}" for name, tool in TOOLS.items()]
    return "\n".join([f"usage: {PROGRAM} TOOL [OPTIONS]", "", *lines, "", f"{PROGRAM} TOOL --help: its options"])


if __name__ == "__main__":
    main()
