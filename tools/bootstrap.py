"""What tools/demo and tools/test need before anything can be imported: Debian packages and a virtual environment.

Standard library only, and no import of this project: it runs under the system's python3 on a machine that has
nothing of ours. Started as part of a script in this directory, so its name stands alone.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    *("gcc", "libc6-dev", "linux-libc-dev", "python3-dev", "python3-venv"),
    *("qemu-system-x86", "qemu-system-common", "qemu-utils", "busybox-static"),
)
"""To build the native module, and to boot a real guest."""


def fail(reason: str) -> NoReturn:
    """Ends the program with one line and status 1."""
    sys.exit(f"{Path(sys.argv[0]).name}: {reason}")


def say(what: str) -> None:
    """One line of progress."""
    print(f"== {what}", flush=True)


def run(*command: str | Path, **environment: str) -> None:
    """Runs a command in the tree's root. Ends the program if it fails; it has said why."""
    status = subprocess.run([str(word) for word in command], cwd=ROOT, env=os.environ | environment).returncode
    if status:
        fail(f"{Path(str(command[0])).name} failed (status {status}): {' '.join(map(str, command))}")


def require_python() -> None:
    """Ends the program under a Python that is too old."""
    if sys.version_info < (3, 11):  # noqa: UP036 - the one place that runs before pip has judged
        fail(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}")


def install(packages: Sequence[str]) -> None:
    """Installs the Debian packages that are missing if we are root; else says which and how."""
    if not shutil.which("dpkg-query"):
        fail(f"this is no Debian system; install what these packages hold: {' '.join(packages)}")
    missing = [name for name in packages if not _installed(name)]
    if not missing:
        return
    if os.geteuid():
        fail(f"packages are missing; as root: apt-get install {' '.join(missing)}")
    say(f"installing {' '.join(missing)}")
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    run("apt-get", "update", "-qq", **quiet)
    run("apt-get", "install", "-y", "-qq", "--no-install-recommends", *missing, **quiet)


def _installed(name: str) -> bool:
    query = ["dpkg-query", "--show", "--showformat=${db:Status-Status}", name]
    return subprocess.run(query, capture_output=True, text=True).stdout == "installed"


def environment(name: str, extra: str) -> Path:
    """The python of a virtual environment in the tree's root with this project and ``extra``, made or brought up to
    date."""
    home = ROOT / name
    python = home / "bin" / "python"
    stamp = home / "installed"
    wanted = _fingerprint(extra)
    if stamp.exists() and stamp.read_text() == wanted and python.exists():
        return python
    say(f"setting up {home}")
    run(sys.executable, "-m", "venv", home)
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--editable", f"{ROOT}[{extra}]")
    stamp.write_text(wanted)
    return python


def _fingerprint(extra: str) -> str:
    """Changes when what is installed has to: the requirements, or the native code."""
    digest = hashlib.sha256(f"{extra} {sys.version}".encode())
    for path in (ROOT / "pyproject.toml", ROOT / "setup.py", *sorted((ROOT / "vhostuser/native").glob("*.[chp]*"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()
