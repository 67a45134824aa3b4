"""The test kit: ends of a connection that do what a test says.

What belongs here: what a test of a device, a back-end or a front-end needs beside the library itself. What does not:
verdicts about strangers.

* ``peer``: an end that follows a script of messages.
"""
