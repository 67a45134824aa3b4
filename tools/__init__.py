"""The command lines: a parser and one call each.

The directory is reached as ``vhostuser.tools`` through a link and a packaging rule; under any other name every class
in it would exist twice.
"""

if __name__ != "vhostuser.tools":
    raise ImportError(f"import vhostuser.tools, not {__name__}: the same module under two names is two modules")
