"""Each layer imports only what lies below it (docs/architecture.md, "Layers")."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NO_IO = {"os", "socket", "asyncio", "mmap", "select", "threading", "uvloop"}

# module -> the modules of the project that it may import; a name stands for everything below it too.
RUNTIME = {"protocol", "_native", "memory", "iotlb", "virtqueue", "uffd"}
RUNTIME |= {"queuestats", "postcopy", "record", "channel", "device", "dataplane", "ring", "metrics", "measures"}
HOOKS = {"hooks", "shared_objects", "shared_memory"}
PARTED = ("faultserver", "frontend")  # packages whose modules are layers of their own
FRONT = {"frontend.memory", "frontend.ring", "frontend.requests"}
PAGES = {f"faultserver.{name}" for name in ("placement", "sources", "stats", "supply")}
ALLOWED = {
    "metrics": set(),
    "pcapng": set(),
    "queuestats": set(),
    "measures": {"metrics", "uffd", "queuestats"},
    "watch": {"measures", "metrics"},
    "offer": {"protocol"},
    "memory": {"protocol", "_native"},
    "iotlb": {"protocol", "_native", "memory"},
    "virtqueue": {"protocol", "_native", "memory", "iotlb", "queuestats", "uffd"},
    "threads": set(),
    "uffd": {"protocol", "_native", "memory", "threads"},
    "postcopy": {"protocol", "memory", "uffd"},
    "record": set(),
    "channel": {"protocol"},
    "device": {"protocol", "metrics", "virtqueue", "dataplane"},
    "dataplane": {"protocol", "device", "memory", "threads", "virtqueue"},
    "ring": RUNTIME - {"channel", "metrics", "measures"},
    "regions": {"protocol", "channel", "memory", "uffd", "postcopy", "record", "metrics", "measures"},
    "lifecycle": RUNTIME - {"channel", "postcopy", "record"} | {"regions"},
    "arguments": {"protocol", "channel", "ring"},
    "ring_messages": {"protocol", "announcements", "backend_channel", "ring"},
    "ring_requests": {"protocol", "arguments", "lifecycle", "ring"},
    "log_requests": {"protocol", "arguments", "lifecycle", "memory", "ring"},
    "device_requests": {"protocol", "arguments", "device", "lifecycle"},
    "hooks": {"protocol"},
    "shared_objects": {"protocol", "announcements", "hooks"},
    "shared_memory": {"protocol", "announcements", "backend_channel", "hooks"},
    "hook_requests": {"protocol", "announcements", "arguments", "device"} | HOOKS,
    "iommu_requests": {"protocol", "arguments", "iotlb", "lifecycle", "memory"},
    "connection": RUNTIME
    | {"hook_requests", "hooks"}
    | {"announcements", "arguments", "lifecycle", "offer", "regions", "transfer", "watch"}
    | {"ring_requests", "device_requests", "log_requests", "ring_messages", "iommu_requests"},
    "backend_channel": {"protocol", "channel"},
    "announcements": {"protocol", "channel", "backend_channel"},
    "transfer": {"protocol", "channel", "device"},
    "backend": RUNTIME | {"connection", "wake_service"},
    "wake": {"protocol", "channel"},
    "wake_service": {"protocol", "metrics", "measures"},
    "driverqueue": {"protocol", "_native", "memory"},
    "frontend.memory": {"protocol", "memory"},
    "frontend.ring": {"protocol", "channel", "driverqueue"},
    "raw": {"protocol", "channel"},
    "frontend.requests": {"protocol", "channel", "raw"},
    "frontend.calls": {"protocol", "channel"} | FRONT,
    "frontend.channel": {"protocol", "channel", "frontend.ring"},
    "frontend.services": {"protocol", "channel", "memory", "frontend.channel"},
    "frontend.postcopy": {"protocol", "frontend.calls"} | FRONT,
    "frontend.state": {"protocol", "channel", "frontend.calls"},
    "frontend.frontend": {
        "protocol",
        "raw",
        "driverqueue",
        "frontend.calls",
        "frontend.channel",
        "frontend.postcopy",
        "frontend.services",
    }
    | FRONT,
    "frontend.iommu": {"protocol", "frontend.frontend"} | FRONT,
    "faultserver.placement": {"protocol", "uffd"},
    "faultserver.stats": set(),
    "faultserver.sources": {"protocol", "_native"},
    "faultserver.feed": {"_native", "memory", "faultserver.sources"},
    "faultserver.channels": {"faultserver.sources"},
    "faultserver.stream": {"faultserver.sources", "threads"},
    "faultserver.supply": {"_native", "faultserver.feed", "faultserver.sources", "threads"},
    "faultserver.server": {"protocol", "_native", "memory", "uffd", "threads"} | PAGES,
}
WITHOUT = {
    "faultserver.placement": {"asyncio", "socket"},
    "faultserver.feed": {"asyncio", "socket"},
    "faultserver.sources": {"asyncio", "socket"},
    "faultserver.channels": {"asyncio", "socket"},
    "faultserver.supply": {"asyncio", "socket"},
    "faultserver.server": {"asyncio", "socket"},
    "memory": {"asyncio", "socket"},
    "iotlb": {"asyncio", "socket"},
    "virtqueue": {"asyncio", "socket"},
    "uffd": {"asyncio", "socket"},
    "driverqueue": {"asyncio", "socket"},
    "frontend.memory": {"asyncio", "socket"},
}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, in full."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, f"{path}: relative import"
            inside = {f"vhostuser.{alias.name}" for alias in node.names}
            found |= inside if node.module == "vhostuser" else {node.module}
    return found


def ours(path: Path) -> set[str]:
    """Its imports of the project, as ``ALLOWED`` names them."""
    return {layer(name.split(".")[1:]) for name in imports(path) if name.startswith("vhostuser.")}


def layer(parts: list[str]) -> str:
    """Modules of a package of several layers are named in full."""
    full = ".".join(parts[:2])
    return full if full in ALLOWED else parts[0]


@pytest.mark.parametrize("path", sorted((ROOT / "protocol").glob("*.py")), ids=lambda path: path.name)
def test_protocol_does_no_io_and_knows_nothing_above_it(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & NO_IO
    assert ours(path) <= {"protocol"}
    if path.name != "payloads.py":
        assert "construct" not in imports(path)


@pytest.mark.parametrize("name", sorted(ALLOWED))
def test_modules_import_only_what_lies_below(name: str) -> None:
    path = ROOT / "vhostuser" / f"{name.replace('.', '/')}.py"
    assert ours(path) <= ALLOWED[name]
    assert not {module.split(".")[0] for module in imports(path)} & WITHOUT.get(name, set())


def test_every_module_has_a_layer() -> None:
    top = {path.stem for path in (ROOT / "vhostuser").glob("*.py")}
    parted = {f"{each}.{path.stem}" for each in PARTED for path in (ROOT / "vhostuser" / each).glob("*.py")}
    assert {name for name in top | parted if not name.endswith("__init__")} == set(ALLOWED)


@pytest.mark.parametrize("path", sorted((ROOT / "vhostuser/devices").glob("*.py")), ids=lambda path: path.name)
def test_devices_know_only_the_device_contract(path: Path) -> None:
    assert ours(path) <= {"device", "devices", "metrics", "pcapng", "protocol", "threads", "virtqueue", "_native"}
    assert not {name for name in imports(path) if name.startswith(("vhostuser.protocol.session", "vhostuser.channel"))}


@pytest.mark.parametrize("path", sorted((ROOT / "vhostuser/drivers").glob("*.py")), ids=lambda path: path.name)
def test_drivers_know_rings_and_no_connections(path: Path) -> None:
    assert ours(path) <= {"driverqueue", "drivers", "frontend.ring", "protocol"}


@pytest.mark.parametrize("path", sorted((ROOT / "vhostuser/conformance").rglob("*.py")), ids=lambda path: path.name)
def test_the_suite_takes_our_back_end_for_a_stranger(path: Path) -> None:
    below = {"channel", "drivers", "driverqueue", "faultserver", "frontend", "protocol", "raw", "uffd"}
    assert ours(path) <= below | {"conformance"}


@pytest.mark.parametrize("path", sorted((ROOT / "vhostuser/testing").glob("*.py")), ids=lambda path: path.name)
def test_the_test_kit_knows_no_tools(path: Path) -> None:
    assert not ours(path) & {"tools", "conformance"}


@pytest.mark.parametrize("path", sorted((ROOT / "vhostuser/native").glob("*.[ch]")), ids=lambda path: path.name)
def test_c_has_no_python_no_stdio_no_threads_and_cannot_abort(path: Path) -> None:
    text = path.read_text()
    for forbidden in ("Python.h", "stdio.h", "assert.h", "abort(", "pthread_create", "exit("):
        assert forbidden not in text, f"{path.name} uses {forbidden}"


@pytest.mark.parametrize("name", ["plan", "truth", "record", "rules", "report"])
def test_the_judgement_of_a_back_end_does_no_io(name: str) -> None:
    """What was seen is judged and shown without a machine: tests need no userfaultfd for it."""
    path = ROOT / "tools/postcopy" / f"{name}.py"
    assert not {module.split(".")[0] for module in imports(path)} & NO_IO
    assert ours(path) <= {"tools"}


@pytest.mark.parametrize("name", ["events", "faults", "jsonlines", "observer", "text", "words"])
def test_a_trace_is_understood_and_written_without_io(name: str) -> None:
    path = ROOT / "tools/trace" / f"{name}.py"
    assert not {module.split(".")[0] for module in imports(path)} & NO_IO
    assert ours(path) <= {"protocol", "tools"}


def test_links_are_in_place() -> None:
    for name in ("protocol", "tools"):
        link = ROOT / "vhostuser" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name
