"""The C files without Python: no warning of either compiler, and no finding of the sanitizers."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from vhostuser.faultserver import Placement, WakePolicy
from vhostuser.uffd import NotPermitted, Userfaultfd

pytestmark = pytest.mark.timeout(300)  # compilers, on a machine that may be busy

ROOT = Path(__file__).parents[2]
NATIVE = ROOT / "vhostuser" / "native"
STRICT = ["-std=gnu11", "-g", "-Wall", "-Wextra", "-Werror", f"-I{NATIVE}"]
SEEDS, ROUNDS = (1, 20261121), 3000


def _clang() -> str | None:
    named = shutil.which("clang")
    return named or next((str(path) for path in sorted(Path("/usr/bin").glob("clang-[0-9]*"))), None)


def compilers() -> list[str]:
    return [found for found in (shutil.which("gcc"), _clang()) if found]


def run(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Path]:
    """Builds tests/native/NAME.c with a compiler and sanitizers; the C files under test are compiled once for all."""
    directories: dict[tuple[str, str], Path] = {}

    def build(name: str, compiler: str, sanitizers: str) -> Path:
        flags = [*STRICT, "-O1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
        directory = directories.get((compiler, sanitizers))
        if directory is None:
            directory = directories[compiler, sanitizers] = tmp_path_factory.mktemp("native")
            for source in sorted(NATIVE.glob("*.c")):
                run(compiler, *flags, "-c", source, "-o", directory / f"{source.stem}.o")
        objects = sorted(directory.glob("*.o"))
        run(compiler, *flags, ROOT / f"tests/native/{name}.c", *objects, "-pthread", "-o", directory / name)
        return directory / name

    return build


Program = Callable[[str, str, str], Path]
COMPILERS = pytest.mark.parametrize("compiler", compilers(), ids=lambda path: Path(path).name)
MEMORY = "address,undefined"


@COMPILERS
@pytest.mark.parametrize("name", ["rings", "packed"])
def test_no_ring_makes_the_native_code_leave_its_memory(program: Program, compiler: str, name: str) -> None:
    """To look further: tests/native/rings.c and packed.c, any seed, any number of rounds."""
    built = program(name, compiler, MEMORY)
    for seed in SEEDS:
        assert run(built, str(seed), str(ROUNDS)) == "ok\n"


@COMPILERS
def test_the_two_sides_of_a_ring_never_miss_each_other(program: Program, compiler: str) -> None:
    """To look further: tests/native/meetings.c, any number of rounds."""
    assert run(program("meetings", compiler, MEMORY), "1", "10000") == "ok\n"


@COMPILERS
def test_no_chain_makes_the_network_engine_leave_its_memory(program: Program, compiler: str) -> None:
    """To look further: tests/native/net.c, any seed, any number of rounds."""
    net = program("net", compiler, MEMORY)
    for seed in SEEDS:
        assert run(net, str(seed), "300") == "ok\n"


@pytest.mark.parametrize("ring", ["split", "packed"])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_kill_behind_any_instruction_loses_no_request_and_returns_none_twice(
    program: Program, ring: str, batch: int
) -> None:
    """To look further: tests/native/crash.c, any seed. Each of the 12 is noted, returned and forgotten."""
    moments = int(run(program("crash", compilers()[0], "undefined"), "20261130", ring, str(batch)))
    assert moments >= {"split": 5, "packed": 12}[ring] * 12, (
        "each of 12 requests is noted, returned and forgotten again"
    )


def test_the_threads_of_a_network_device_do_not_race(program: Program) -> None:
    """A stream's connection is replaced under its threads."""
    assert run(program("net", compilers()[0], "thread"), "1", "0") == "ok\n"


@pytest.mark.parametrize("sanitizers", ["thread", MEMORY])
def test_no_chain_uses_what_was_taken_back(program: Program, sanitizers: str) -> None:
    """Translations go while a ring is served. To look further: tests/native/translations.c, any number of rounds."""
    assert run(program("translations", compilers()[0], sanitizers), "1", "1000") == "ok\n"


@pytest.mark.parametrize("sanitizers", ["thread", MEMORY])
def test_the_threads_of_a_hub_do_not_race(program: Program, sanitizers: str) -> None:
    """Threads that fill a mailbox while another sleeps on it and empties it: nothing is lost, torn or out of order."""
    assert run(program("mailbox", compilers()[0], sanitizers), "1") == "ok\n"


@pytest.mark.postcopy
@pytest.mark.parametrize("sanitizers", ["thread", MEMORY])
def test_the_threads_of_a_fault_server_do_not_race(program: Program, sanitizers: str) -> None:
    """To look further: tests/native/faults.c, any seed, any number of rounds."""
    try:
        Userfaultfd.probe()
    except NotPermitted as error:
        pytest.skip(str(error))
    faults = program("faults", compilers()[0], sanitizers)
    for put, wake in itertools.product((Placement.COPY, Placement.CONTINUE), WakePolicy):
        assert run(faults, "1", "3", str(int(put)), str(int(wake))) == "ok\n", (put, wake)


@COMPILERS
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
