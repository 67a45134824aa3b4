"""The handbook is built without a warning: its links and anchors, its docstrings; what is made from tables is as they
are."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.docs.blocks import ROOT

DOCS = ROOT / "docs"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.timeout(280)
def test_it_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-d", tmp_path / "doctrees"]
    done = subprocess.run([*command, DOCS, tmp_path / "site"], capture_output=True, text=True, timeout=270)
    assert done.stderr == ""
    assert done.returncode == 0
    pages = {path.relative_to(DOCS).with_suffix("") for path in DOCS.glob("*.md")}
    assert {page for page in pages if not (tmp_path / "site" / f"{page}.html").exists()} == set()


def test_pictures_are_drawn_from_the_tables() -> None:
    draw = script("draw")
    for name, make in draw.PICTURES.items():
        assert (DOCS / name).read_text() == make(), "run: python docs/draw.py"


def test_observations_stand_beside_the_catalog() -> None:
    assert (DOCS / "observed.md").read_text() == script("observe").page(), "run: python docs/observe.py"
