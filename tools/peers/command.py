"""``tools/results``: tries every program of the table that can be had, and writes docs/conformance-results.md; or shows
what comes of some cases on one of them.

What belongs here: options, the order of things, the files of results. What does not: trying (``run``), the page's text
(``page``).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from vhostuser.tools.lab.errors import LabError
from vhostuser.tools.lab.image import cache_directory
from vhostuser.tools.peers import page
from vhostuser.tools.peers.debian import Release
from vhostuser.tools.peers.run import ROOT, NotHere, Outcome, attempt, show
from vhostuser.tools.peers.table import PEERS, Peer

_PAGE = ROOT / "docs/conformance-results.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """0: the page is written and explains every failure; 1: something fails that no waiver explains, or cannot be
    tried; 2: wrong options. With cases: what ``vhostuser conform`` ends with."""
    options = _parse(arguments)
    if options.cases:
        return _show(options.only[0], options.cases)
    results = cache_directory() / "results"
    results.mkdir(parents=True, exist_ok=True)
    try:
        absent = _try(options.only, results)
    except LabError as error:
        print(f"tools/results: {error}", file=sys.stderr)
        return 1
    found = [(peer, _load(results, peer)) for peer in PEERS if _file(results, peer).exists()]
    options.output.write_text(page.render(found, absent))
    return _complain(found)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/results", description="Puts back-ends and front-ends through the conformance suite."
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", choices=["none", *(peer.name for peer in PEERS)],
        help="try only this one, and take the rest of the page from the last time; none: write the page anew",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, default=_PAGE, metavar="FILE", help="default docs/conformance-results.md"
    )
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help="with one --only: try these alone, and print what they do; no page"
    )
    options = parser.parse_args(arguments)
    if options.cases and (len(options.only) != 1 or options.only == ["none"]):
        parser.error("cases are tried on one program: --only=NAME CASE...")
    return options


def _show(name: str, cases: Sequence[str]) -> int:
    (peer,) = (peer for peer in PEERS if peer.name == name)
    try:
        return show(peer, _releases([peer]), cases)
    except (LabError, NotHere) as error:
        print(f"tools/results: {error}", file=sys.stderr)
        return 1


def _try(names: Sequence[str], results: Path) -> list[str]:
    """Tries them, all by default, and keeps each outcome in a file. Returns a line for each that cannot be had."""
    wanted = [peer for peer in PEERS if not names or peer.name in names]
    releases = _releases(wanted)
    absent = []
    with tempfile.TemporaryDirectory(prefix="results-") as scratch:
        for peer in wanted:
            print(f"== {peer.name}", flush=True)
            try:
                outcome = attempt(peer, releases, Path(scratch))
            except NotHere as error:
                absent.append(str(error))
                _file(results, peer).unlink(missing_ok=True)
                continue
            _file(results, peer).write_text(json.dumps(asdict(outcome)))
            print(f"   {outcome.seconds:.0f} s", flush=True)
    return absent


def _releases(wanted: Sequence[Peer]) -> dict[str, Release]:
    """The other releases of Debian that are needed, unpacked."""
    found = {}
    for name in {peer.release for peer in wanted if peer.release}:
        found[name] = Release(name, cache_directory() / "debian")
        found[name].unpack(sorted({peer.package for peer in PEERS if peer.release == name}))
    return found


def _file(results: Path, peer: Peer) -> Path:
    return results / f"{peer.name}.json"


def _load(results: Path, peer: Peer) -> Outcome:
    return Outcome(**json.loads(_file(results, peer).read_text()))


def _complain(found: Sequence[tuple[Peer, Outcome]]) -> int:
    """Names what has no explanation, and explanations that explain nothing any more."""
    status = 0
    for peer, outcome in found:
        if new := page.unexplained(outcome):
            print(f"{peer.name}: not explained: {', '.join(new)}", file=sys.stderr)
            status = 1
        if outcome.idle:
            print(f"{peer.name}: waivers that are not needed any more: {', '.join(outcome.idle)}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
