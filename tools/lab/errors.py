"""The one exception of the bench; no behaviour."""


class LabError(Exception):
    """A peer or the machine did not do what the bench asked for: one line, and the cure where there is one."""
