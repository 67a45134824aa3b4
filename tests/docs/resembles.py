"""Compares what a command said (a file) with what a page shows of it (standard input).

"..." in a line, or in the place of lines, stands for anything; a page may show nothing at all.
"""

import sys
from fnmatch import fnmatchcase
from pathlib import Path


def resembles(said: str, shown: str) -> bool:
    pattern = shown.replace("[", "[[]").replace("?", "[?]").replace("*", "[*]").replace("...", "*")
    return not shown.strip() or fnmatchcase(said.strip(), pattern.strip())


if __name__ == "__main__":
    said = Path(sys.argv[1]).read_text()
    if not resembles(said, sys.stdin.read()):
        sys.exit(f"the page shows something else than what is said now:\n{said}")
