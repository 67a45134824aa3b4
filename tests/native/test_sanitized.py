"""The C files without Python: no warning of either compiler, and no finding of the sanitizers."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from vhostuser.faultserver import Placement, WakePolicy
from vhostuser.uffd import NotPermitted, Userfaultfd

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "vhostuser" / "native"
STRICT = ["-std=gnu11", "-g", "-Wall", "-Wextra", "-Werror", f"-I{NATIVE}"]
SANITIZED = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
SEEDS, ROUNDS = (1, 20261121), 3000


def _clang() -> str | None:
    named = shutil.which("clang")
    return named or next((str(path) for path in sorted(Path("/usr/bin").glob("clang-[0-9]*"))), None)


def compilers() -> list[str]:
    return [found for found in (shutil.which("gcc"), _clang()) if found]


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module", params=compilers(), ids=lambda path: Path(path).name)
def build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Builds a program of this directory; the native code is compiled once a compiler."""
    directory = tmp_path_factory.mktemp("native")
    command = [request.param, *STRICT, *SANITIZED]
    objects = [directory / f"{source.stem}.o" for source in sorted(NATIVE.glob("*.c"))]
    for source, compiled in zip(sorted(NATIVE.glob("*.c")), objects, strict=True):
        run(*command, "-c", source, "-o", compiled)

    @functools.cache
    def program(name: str) -> Path:
        run(*command, ROOT / f"tests/native/{name}.c", *objects, "-pthread", "-o", directory / name)
        return directory / name

    return program


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["rings", "packed"])
def test_no_ring_makes_the_native_code_leave_its_memory(build: Callable[[str], Path], name: str, seed: int) -> None:
    """To look further: tests/native/rings.c and packed.c, any seed, any number of rounds."""
    assert run(build(name), str(seed), str(ROUNDS)) == "ok\n"


def test_the_two_sides_of_a_ring_never_miss_each_other(build: Callable[[str], Path]) -> None:
    """To look further: tests/native/meetings.c, any number of rounds."""
    assert run(build("meetings"), "1", "10000") == "ok\n"


@pytest.fixture(scope="module", params=["thread", "address,undefined"])
def faults(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        Userfaultfd.probe()
    except NotPermitted as error:
        pytest.skip(str(error))
    program = tmp_path_factory.mktemp("native") / "faults"
    sources = [ROOT / "tests/native/faults.c", *sorted(NATIVE.glob("*.c"))]
    flags = ["-O1", f"-fsanitize={request.param}", "-fno-sanitize-recover=all"]
    run(compilers()[0], *STRICT, *flags, *sources, "-pthread", "-o", program)
    return program


@pytest.mark.postcopy
@pytest.mark.parametrize("put", [Placement.COPY, Placement.CONTINUE])
@pytest.mark.parametrize("wake", list(WakePolicy))
def test_the_threads_of_a_fault_server_do_not_race(faults: Path, put: Placement, wake: WakePolicy) -> None:
    """To look further: tests/native/faults.c, any seed, any number of rounds."""
    assert run(faults, "1", "3", str(int(put)), str(int(wake))) == "ok\n"


@pytest.mark.parametrize("compiler", compilers(), ids=lambda path: Path(path).name)
def test_no_warnings_where_the_optimiser_looks_hardest_and_no_public_name_without_prefix(
    compiler: str, tmp_path: Path
) -> None:
    for source in sorted(NATIVE.glob("*.c")):
        compiled = tmp_path / f"{source.stem}.o"
        run(compiler, *STRICT, "-O2", "-c", source, "-o", compiled)
        names = [line.split()[-1] for line in run("nm", "--defined-only", "--extern-only", compiled).splitlines()]
        assert all(name.startswith("vu_") for name in names), source.name


def test_what_the_native_code_may_not_do() -> None:
    """No Python, no stdio, no way to end the process, no threads of its own."""
    for source in NATIVE.glob("*.[ch]"):
        text = source.read_text()
        for forbidden in ("Python.h", "stdio.h", "assert.h", "abort(", " exit(", "pthread_create"):
            assert forbidden not in text, f"{source.name}: {forbidden}"
