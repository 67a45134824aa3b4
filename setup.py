"""Builds vhostuser._native; everything else is in pyproject.toml."""

import sysconfig

from setuptools import setup

# One wheel for every CPython from 3.11 on. A free-threaded build has no stable ABI before 3.15.
abi3 = {} if sysconfig.get_config_var("Py_GIL_DISABLED") else {"py_limited_api": "cp311"}
setup(cffi_modules=["vhostuser/native/build.py:ffi"], options={"bdist_wheel": abi3})
