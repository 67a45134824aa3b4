"""Runs a block of the documentation as a reader would, in a directory of its own, and ends what it leaves running.

What a reader has is there: our programs, this tree's examples, tests and tools, a back-end called ``my-backend``.
Paths below /tmp, /run and /var/tmp lead into the directory. A command in the background whose socket is named on its
line is waited for until it listens there.
"""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tests.docs.blocks import ROOT, Block

HERE = Path(__file__).parent
PATIENCE = 50.0
"""Seconds for a block, and those that continue it. What takes longer has a test of its own."""

_PRELUDE = r"""
set -e
listening() {  # until somebody listens at the path $1, as the kernel says
    for ((i = 0; i < 3000; i++)); do
        grep -q " 00010000 .* $1\$" /proc/net/unix && return
        sleep 0.01
    done
    echo "nobody listens at $1"
    return 1
}
ended() {
    [ "$1" = "$2" ] || { echo "status $2, not $1"; exit 1; }
}
"""
_SOCKET = re.compile(r"--(?:socket-path|listen|socket|wake-socket)[= ](\S+)")


class BlockFailed(AssertionError):
    """Says where the block is, what was run and what it said."""

    def __init__(self, block: Block, why: str, said: str) -> None:
        super().__init__(f"{block}: {why}\n{block.text}\n--- it said:\n{said[-4000:]}")


def run(sequence: Sequence[Block], directory: Path, patience: float = PATIENCE) -> None:
    """Raises BlockFailed. directory: empty, with a path short enough for sockets."""
    for name in ("examples", "tests", "tools", "share"):
        (directory / name).symlink_to(ROOT / name)
    (directory / "docs").mkdir()
    placed = [_inside(block, directory) for block in sequence]
    status, said = _execute(_PRELUDE + "".join(map(_script, placed)), directory, patience)
    begun = [block for block in placed if f"{block}" in (directory / "begun").read_text().splitlines()][-1]
    if status is None:
        raise BlockFailed(begun, f"did not end within {patience:g} s (is it <!-- in the background -->?)", said)
    if status:
        raise BlockFailed(begun, f"status {status}", said)


def _script(block: Block) -> str:
    """A block in the shell's words."""
    return f"echo '{block}' >>begun\n{_LANGUAGES[_kind(block)](block)}"


def _kind(block: Block) -> str:
    if "saved as" in block.marks:
        return "file"
    return block.language if block.language in ("python", "console") else "shell"


def _file(block: Block) -> str:
    return _here(f"cat >{block.marks['saved as']}", block.text)


def _python(block: Block) -> str:
    """Python with its before and after; awaits are allowed everywhere."""
    whole = (block.marks.get("before", ""), block.text, block.marks.get("after", ""))
    return _here(f"python {HERE / 'snippet.py'}", "\n".join(whole))


def _here(command: str, text: str) -> str:
    return f"{command} <<'END OF THE BLOCK'\n{text}\nEND OF THE BLOCK\n"


def _shell(block: Block) -> str:
    """Shell commands with their before and after."""
    text = _settled(block.text)
    if "in the background" in block.marks:
        text = f"{{\n{block.text}\n}} &\n" + _listening(block.text)
    if "exits" in block.marks:
        text = f"set +e\n( set -e\n{text}\n)\nended {block.marks['exits']} $?\nset -e\n"
    return "\n".join((_settled(block.marks.get("before", "")), text, _settled(block.marks.get("after", ""))))


def _console(block: Block) -> str:
    """Commands whose output is compared with what the page shows."""
    lines = []
    for number, (command, expected) in enumerate(dialogue(block.text)):
        lines.append(f"{{ {command}\n}} >said.{number} 2>&1 || {{ status=$?; cat said.{number}; exit $status; }}\n")
        lines.append(_here(f"python {HERE / 'resembles.py'} said.{number}", "\n".join(expected)))
    return "".join((_settled(block.marks.get("before", "")), *lines, _settled(block.marks.get("after", ""))))


_LANGUAGES = {"python": _python, "shell": _shell, "console": _console, "file": _file}


def _settled(script: str) -> str:
    """The script, which waits behind each command in the background until its sockets are there."""
    whole = re.sub(r"\\\n\s*", " ", script)
    return "".join(f"{line}\n" + (_listening(line) if _in_background(line) else "") for line in whole.splitlines())


def _in_background(line: str) -> bool:
    return line.partition("  #")[0].rstrip().endswith(" &")


def _listening(line: str) -> str:
    return "".join(f"listening {path}\n" for path in _SOCKET.findall(line))


def dialogue(text: str) -> list[tuple[str, list[str]]]:
    """Commands, which stand behind "$ ", and the lines that are said to them."""
    found: list[tuple[str, list[str]]] = []
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif found:
            found[-1][1].append(line)
    return found


def _inside(block: Block, directory: Path) -> Block:
    def moved(text: str) -> str:
        return re.sub(r"(?<![\w/.])/(tmp|run|var/tmp)/", f"{directory}/", text)

    return replace(block, text=moved(block.text), marks={name: moved(value) for name, value in block.marks.items()})


def _execute(script: str, directory: Path, patience: float) -> tuple[int | None, str]:
    """The status, None if it did not end in time, and all that was said. No process of it is left."""
    path = f"{HERE / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    alive, held = os.pipe()
    with (directory / "output").open("w+") as output:
        process = subprocess.Popen(
            ["bash", "-c", script], cwd=directory, env=os.environ | {"PATH": path, "NO_COLOR": "1"},
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, pass_fds=[held],
        )  # fmt: skip
        os.close(held)
        try:
            status: int | None = process.wait(patience)
        except subprocess.TimeoutExpired:
            status = None
        _end(process, alive)
        output.seek(0)
        return status, output.read()


def _end(process: subprocess.Popen[bytes], alive: int) -> None:
    """Ends all processes of the session. The pipe has its end when the last that inherited it has gone."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        if select.select([alive], [], [], 10)[0]:
            break
    os.close(alive)
    process.wait()
