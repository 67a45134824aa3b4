"""Links between pages of this tree, and the paths of it that pages name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tests.docs.blocks import ROOT

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
_FENCED = re.compile(r"^\s*```.*?^\s*```", re.MULTILINE | re.DOTALL)
_PATH = re.compile(r"`((?:docs|examples|protocol|share|tests|tools|vhostuser)/[\w./-]+)`")


def broken(page: Path) -> Iterator[str]:
    """The links of a page, a line each, that lead nowhere. Those to other hosts are not followed."""
    text = _FENCED.sub("", page.read_text())
    for target in _LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists():
            yield f"{page.relative_to(ROOT)}: there is no {target}"
        elif anchor and anchor not in anchors(path.read_text()):
            yield f"{page.relative_to(ROOT)}: {name or 'this page'} has no heading #{anchor}"
    for name in _PATH.findall(text):
        if not (ROOT / name).exists():
            yield f"{page.relative_to(ROOT)}: names {name}, which does not exist"


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    return {_slug(heading) for heading in _HEADING.findall(_FENCED.sub("", text))}


def _slug(heading: str) -> str:
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower().strip()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
