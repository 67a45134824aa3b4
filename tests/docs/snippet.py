"""Runs the Python on its standard input: a program, or lines of a coroutine that stand alone."""

import ast
import asyncio
import inspect
import sys

sys.path.insert(0, "examples")
code = compile(sys.stdin.read(), "the block", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
if code.co_flags & inspect.CO_COROUTINE:
    asyncio.run(eval(code, {"__name__": "__main__"}))
else:
    exec(code, {"__name__": "__main__"})
