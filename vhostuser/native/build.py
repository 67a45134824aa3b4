"""Builds vhostuser._native with cffi in API mode: the C compiler checks every declaration of api.h.

What belongs here: the list of C files and their flags. setup.py is the only caller; setuptools runs this
file from the project's root.
"""

import os
import re
from pathlib import Path

from cffi import FFI

HERE = Path("vhostuser/native")
SOURCES = sorted(str(path) for path in HERE.glob("*.c"))
HEADERS = sorted(str(path) for path in HERE.glob("*.h"))
FLAGS = ["-std=gnu11", "-O2", "-g", "-Wall", "-Wextra", "-fvisibility=hidden"]

# The generated wrapper has its own unused parameters; the same C files are compiled with -Werror by the test of the
# native code, where no wrapper is in the way. VHOSTUSER_CFLAGS adds flags, a sanitizer for instance.
ffi = FFI()
ffi.cdef(re.sub(r"/\*.*?\*/", "", (HERE / "api.h").read_text(), flags=re.DOTALL))
ffi.set_source(
    "vhostuser._native",
    '#include <stdint.h>\n#include <stddef.h>\n#include "api.h"',
    sources=SOURCES,
    include_dirs=[str(HERE)],
    depends=[*HEADERS, str(HERE / "build.py")],
    extra_compile_args=FLAGS + os.environ.get("VHOSTUSER_CFLAGS", "").split(),
    extra_link_args=["-pthread", *os.environ.get("VHOSTUSER_LDFLAGS", "").split()],
)
