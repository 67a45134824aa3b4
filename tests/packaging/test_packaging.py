"""What is shipped can be built and used by others: source archive, wheel, its tag and its content."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = ("tools/demo", "tools/results", "tools/test")

pytestmark = pytest.mark.timeout(300)


def run(*command: str | Path, cwd: Path) -> str:
    """The output of a command that must succeed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source archive of the tree, and the wheel that is built from it and not from the tree."""
    directory = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", directory, ROOT, cwd=directory)
    (archive,) = directory.glob("*.tar.gz")
    (wheel,) = directory.glob("*.whl")
    return archive, wheel


def test_one_wheel_serves_every_cpython_from_3_11(built: tuple[Path, Path]) -> None:
    assert "-cp311-abi3-linux" in built[1].name


def test_the_wheel_holds_the_package_and_no_source_of_c(built: tuple[Path, Path]) -> None:
    names = zipfile.ZipFile(built[1]).namelist()
    code = "protocol/catalog.py", "tools/blk.py", "backend.py", "tools/trace/dissector.lua"
    for wanted in ("py.typed", "_native.pyi", "_native.abi3.so", *code):
        assert f"vhostuser/{wanted}" in names
    for shipped in ("qemu/vhost-user/50-vhostuser-blk.json", "vhostuser/systemd/vhostuser-blk@.service"):
        assert any(name.endswith(f".data/data/share/{shipped}") for name in names)
    assert not [name for name in names if name.endswith((".c", ".h"))]
    assert {name.split("/")[0].split("-")[0] for name in names} == {"vhostuser"}


def test_the_source_archive_can_build_and_be_tested(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for wanted in ("vhostuser/native/api.h", "vhostuser/native/build.py", "tests/conftest.py", "LICENSE", *COMMANDS):
        assert wanted in names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_the_wheel_works_in_an_environment_of_its_own(built: tuple[Path, Path], tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", built[1], cwd=tmp_path)
    where = run(python, "-c", "import vhostuser.backend as b; print(b.__file__)", cwd=tmp_path)
    assert where.startswith(str(tmp_path))
    capabilities = run(tmp_path / "venv/bin/vhostuser-blk", "--print-capabilities", "--nonsense", cwd=tmp_path)
    assert capabilities.strip() == '{"type": "block", "features": ["read-only", "blk-file"]}'
    assert run(tmp_path / "venv/bin/vhostuser-net", "--print-capabilities", cwd=tmp_path).strip() == '{"type": "net"}'


def test_the_bare_directory_refuses_to_be_a_second_copy() -> None:
    """`import protocol` from the tree's root would make every class twice."""
    done = subprocess.run([sys.executable, "-c", "import protocol"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ImportError: import vhostuser.protocol, not protocol" in done.stderr
