"""The stub says what the compiled module has, and the layouts that both sides know are the same."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from vhostuser._native import ffi, lib
from vhostuser.virtqueue import _PEEK

ROOT = Path(__file__).parents[2]
HEADER = re.sub(r"/\*.*?\*/", "", (ROOT / "vhostuser/native/api.h").read_text(), flags=re.DOTALL)


def stub() -> dict[str, int | None]:
    """Name -> number of parameters, or None for a constant."""
    tree = ast.parse((ROOT / "vhostuser/_native.pyi").read_text())
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Lib")
    found: dict[str, int | None] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = len(node.args.posonlyargs) - 1 if node.args.posonlyargs else 0
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = None
    return found


def test_the_stub_names_what_there_is() -> None:
    assert set(stub()) == set(dir(lib))


def test_the_stub_knows_how_many_parameters_each_function_takes() -> None:
    declared = {name: count for name, count in stub().items() if count is not None}
    assert declared == {name: len(ffi.typeof(getattr(lib, name)).args) for name in declared}


@pytest.mark.parametrize("name", sorted(set(re.findall(r"^(?:typedef )?struct (\w+) \{", HEADER, re.MULTILINE))))
def test_every_struct_is_as_the_compiler_lays_it_out(name: str) -> None:
    """cffi compares sizes and offsets at the first use of a struct, so each is used once."""
    assert ffi.sizeof(f"struct {name}") > 0


def test_records_that_python_unpacks_itself() -> None:
    assert _PEEK.size == ffi.sizeof("struct vu_peek")


def test_everything_is_prefixed() -> None:
    assert all(name.startswith(("vu_", "VU_")) for name in dir(lib))
