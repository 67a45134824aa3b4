"""Conformance: a verdict for every rule, about a back-end that somebody else wrote.

What belongs here: cases, how they are run and reported. What does not: the command line (``tools.conform``), our own
back-end, which is a stranger to this package like any other.

- ``suite``: what a case is, and running it. ``waivers``, ``report``: what becomes of the verdicts.
- ``subject``: the back-end under test, connected to or started. ``bench``: what a case has at hand. ``lane``: a ring
  with requests in it.
- ``backend_cases``: the cases, a module for each theme.
"""
