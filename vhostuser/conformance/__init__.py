"""Conformance: a verdict for every rule, about a back-end or a front-end that somebody else wrote.

What belongs here: cases, how they are run and reported. What does not: the command line (``tools.conform``), our own
ends, which are strangers to this package like any others.

- ``suite``: what a case is, and running it. ``waivers``, ``report``: what becomes of the verdicts.
- ``subject``: the back-end under test, connected to or started. ``bench``: what a case has at hand. ``lane``: a ring
  with requests in it.
- ``backend_cases``: the cases, a module for each theme.
- For front-ends: ``caller`` is the one under test, ``offer`` and ``standin`` the back-end that it meets, ``transcript``
  what it said, ``stage`` the plays in which that happens. ``frontend_cases``: the cases.
"""
