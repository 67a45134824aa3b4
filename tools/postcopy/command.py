"""``vhostuser postcopy``: from the command line to the exit status.

What belongs here: one run for each flow and wake policy that was asked for, and what is printed where. Tables and JSON
go to stdout, progress and errors to stderr.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Sequence

from vhostuser.tools.postcopy import plot, report
from vhostuser.tools.postcopy.options import Options, parse
from vhostuser.tools.postcopy.progress import Progress, suited
from vhostuser.tools.postcopy.report import Result
from vhostuser.tools.postcopy.run import RunError, perform


def main(program: str, arguments: Sequence[str]) -> int:
    """The exit status: 0 if every check of every run passed, 1 if not; wrong options end the process with 2."""
    options = parse(program, arguments)
    try:
        if options.plot is not None:
            plot.require()
        results = _perform_all(options)
        _show(options, results)
    except (RunError, plot.PlotError) as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except asyncio.CancelledError:
        return 128 + signal.SIGTERM
    return 0 if all(result.verdict.passed for result in results) else 1


def _perform_all(options: Options) -> list[Result]:
    with suited(quiet=options.quiet) as progress:
        return asyncio.run(_in_turn(options, progress))


async def _in_turn(options: Options, progress: Progress) -> list[Result]:
    task = asyncio.current_task()
    assert task is not None
    # As asyncio does for SIGINT: back-ends that we have started end before we do, and files are removed.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return [await perform(options, flow, wake, progress) for flow in options.flows for wake in options.wakes]


def _show(options: Options, results: Sequence[Result]) -> None:
    if options.json:
        print(json.dumps(report.as_json(results), indent=2))
    else:
        colour = sys.stdout.isatty()
        print("\n\n".join(report.text(result, colour=colour) for result in results))
        if len(results) > 1:
            print(f"\n{report.comparison(results)}")
    if options.plot is not None:
        plot.draw(results, options.plot)
