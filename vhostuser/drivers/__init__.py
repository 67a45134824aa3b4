"""What a guest's drivers put into rings, for front-ends: ``blk`` and ``net``.

What belongs here: the layout of requests and frames in guest memory. What does not: rings (``driverqueue``), the
messages that bring them up (``frontend``).
"""
