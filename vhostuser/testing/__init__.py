"""The test kit: a device, a back-end or a front-end is tested in one process, without a virtual machine.

What belongs here: what a test needs beside the library itself. What does not: verdicts about strangers. docs/testing.md
shows how it is used.

* ``pair``: a back-end and a front-end that are connected.
* ``peer``: one end of a connection that follows a script of messages.
* ``leaks``: descriptors and mappings that a test leaves behind.
* ``plugin``: all of these as pytest fixtures. It alone needs pytest and pytest-asyncio (``vhostuser[testing]``).
"""
