"""protocol/ does no input or output and knows nothing of the rest of the project."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "protocol").glob("*.py"))
STDLIB = {"collections", "dataclasses", "enum", "struct", "typing"}

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, "relative import"
            names.add(node.module)
    return names


@every_file
def test_only_the_harmless_part_of_the_standard_library(path: Path) -> None:
    foreign = {name for name in imported(path) if not name.startswith("vhostuser.protocol")}
    allowed = STDLIB | ({"construct"} if path.name == "payloads.py" else set())
    assert {name.split(".")[0] for name in foreign} <= allowed


@every_file
def test_no_function_does_input_or_output(path: Path) -> None:
    calls = {
        node.func.id
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not calls & {"open", "print", "input", "exec", "eval", "__import__"}


@every_file
def test_no_function_is_long(path: Path) -> None:
    """Apart from the generators that spell out the catalog, one row after the other."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.end_lineno and not node.name.endswith("_rows"):
            assert node.end_lineno - node.lineno < 50, node.name


def test_a_second_copy_of_the_package_cannot_be_imported() -> None:
    """From the root of the source tree `import protocol` would make every class anew."""
    program = "try:\n import protocol\nexcept ImportError as e:\n print(e)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "import vhostuser.protocol, not protocol" in done.stdout


def test_the_compiled_module_is_not_needed() -> None:
    program = "import sys; sys.modules['vhostuser._native'] = None; import vhostuser.protocol"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
