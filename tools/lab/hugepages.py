"""Enough free 2 MiB pages for the machines of a bench, given back afterwards."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from vhostuser.tools.lab.errors import LabError

POOL = Path("/proc/sys/vm/nr_hugepages")


@contextlib.contextmanager
def hugepages(count: int) -> Iterator[None]:
    """At least ``count`` free pages of 2 MiB while the context lasts; ``LabError`` with the cure where that fails."""
    added = 0
    try:
        for _ in range(5):  # whoever else uses the pool may be quicker to take what was added
            if (missing := count - _free()) <= 0:
                break
            added += _resize(missing)
        if (free := _free()) < count:
            wanted = int(POOL.read_text()) + count - free
            raise LabError(f"{count} free pages of 2 MiB are needed, there are {free}: as root, echo {wanted} >{POOL}")
        yield
    finally:
        _resize(-added)


def _resize(pages: int) -> int:
    """Add so many pages to the pool, or take them out; how many the kernel has added, 0 if we may not."""
    before = int(POOL.read_text())
    with contextlib.suppress(PermissionError):
        POOL.write_text(f"{before + pages}\n")
    return int(POOL.read_text()) - before


def _free() -> int:
    """Pages that nobody uses and that are not promised to a mapping either."""
    fields = dict(re.findall(r"^HugePages_(\w+):\s+(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE))
    return int(fields.get("Free", 0)) - int(fields.get("Rsvd", 0))
