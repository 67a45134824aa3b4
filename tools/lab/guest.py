"""Shell commands in a running guest, wherever it runs at the moment.

The channel is the guest's second serial port. A line to the guest is ``ID COMMAND .`` with the command in
base64; a line from it is ``ID STATUS OUTPUT.``, in base64 too, or ``ready BOOT`` when it has booted. A migration takes
the guest away from one QEMU's port to another's in the middle of a line. Hence:

* what the ports send is one stream: the source's bytes come first, since the destination's guest stands still
* after the switch all commands without an answer are sent again; the guest ignores an id that it has seen, and a line
  that does not end in a full stop

The guest's half is image.AGENT.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
from dataclasses import dataclass

from vhostuser.tools.lab.errors import LabError
from vhostuser.tools.lab.journal import Journal
from vhostuser.tools.lab.machine import Machine


class CommandFailed(LabError):
    """A command ended with a status other than 0, or the guest rebooted under it."""


@dataclass(frozen=True)
class _Command:
    line: bytes
    text: str
    answer: asyncio.Future[str]


class Guest:
    """The Linux in a machine, and in the machines that it migrates to: an async context manager."""

    def __init__(self) -> None:
        self._boots: Journal[str] = Journal("guest")
        self._ids = itertools.count(1)
        self._unanswered: dict[int, _Command] = {}
        self._received = bytearray()
        self._writer: asyncio.StreamWriter | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Guest:
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fail_unanswered("the bench was taken down")

    def follow(self, machine: Machine) -> None:
        """Talk to the guest through ``machine``: at once, or as soon as an incoming migration runs there."""
        for work in (self._listen(machine), self._take_over(machine)):
            self._tasks.add(asyncio.create_task(work))

    async def booted(self, boot: int = 1, within: float = 90) -> None:
        """Wait until the guest has booted for the ``boot``-th time."""
        await self._boots.find(lambda entry: True, f"boot number {boot}", start=boot - 1, within=within)

    @property
    def boots(self) -> int:
        """How many times it has booted."""
        return len(self._boots.entries)

    async def run(self, command: str, within: float = 90) -> str:
        """The output (stdout and stderr, trailing newlines removed) of a shell command in the guest.

        Several may run at a time. Raises ``CommandFailed`` if its status is not 0 or the guest reboots under it, and
        ``LabError`` if it has no answer within ``within`` seconds.
        """
        number = next(self._ids)
        line = b"%d %s .\n" % (number, base64.b64encode(command.encode()))
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._unanswered[number] = _Command(line, command, answer)
        try:
            async with asyncio.timeout(within):
                self._send(line)
                return await answer
        except TimeoutError:
            raise LabError(f"guest: no answer within {within:g} s to: {command}") from None
        finally:
            self._unanswered.pop(number, None)

    def start(self, command: str) -> None:
        """Run a command whose end and output nobody waits for."""
        self._tasks.add(asyncio.create_task(self._run_unattended(command)))

    async def reboot(self) -> None:
        """Reset the guest and wait until it has booted again. Fails all commands that have no answer."""
        boots = self.boots
        # No answer comes: the guest is gone before the shell's status is.
        self._send(b"%d %s .\n" % (next(self._ids), base64.b64encode(b"reboot -f")))
        await self.booted(boots + 1)

    async def flush_tlbs(self, cpus: int) -> None:
        """Have every virtual CPU change its page table, upon which QEMU's TCG forgets all its translations."""
        await self.run(f"for cpu in $(seq 0 {cpus - 1}); do taskset -c $cpu true && taskset -c $cpu true; done")

    async def _run_unattended(self, command: str) -> None:
        with contextlib.suppress(LabError):
            await self.run(command, within=3600)

    def _send(self, line: bytes) -> None:
        if self._writer is None:
            raise LabError("guest: no machine is attached")
        self._writer.write(line)

    async def _take_over(self, machine: Machine) -> None:
        if machine.incoming:
            await machine.event("RESUME", within=600)
        self._writer = machine.agent_writer
        # The newline ends what the source's port may have let through of a line.
        self._send(b"\n" + b"".join(command.line for command in self._unanswered.values()))

    async def _listen(self, machine: Machine) -> None:
        while data := await machine.agent_reader.read(65536):
            self._received += data
            *lines, self._received = self._received.split(b"\n")
            for line in lines:
                self._hear(line.decode(errors="replace").split())

    def _hear(self, words: list[str]) -> None:
        match words:
            case ["ready", boot]:
                self._fail_unanswered("the guest rebooted")
                self._boots.append(boot)
            case [number, status, output] if output.endswith(".") and number.isdigit():
                self._answer(int(number), int(status), base64.b64decode(output[:-1]).decode(errors="replace"))

    def _answer(self, number: int, status: int, output: str) -> None:
        command = self._unanswered.pop(number, None)
        if command is None or command.answer.done():
            return
        if status:
            command.answer.set_exception(CommandFailed(f"guest: status {status} from: {command.text}: {output}"))
        else:
            command.answer.set_result(output.rstrip("\n"))

    def _fail_unanswered(self, reason: str) -> None:
        for command in self._unanswered.values():
            if not command.answer.done():
                command.answer.set_exception(CommandFailed(f"guest: {reason} during: {command.text}"))
        self._unanswered.clear()
