"""``vhostuser trace``: sits between a front-end and a back-end, passes everything on, and says what it sees.

``command`` is the tool; ``relay`` the sockets; ``events`` what is seen, which ``text``, ``jsonlines`` and ``pcapng``
write, and for the last ``dissector`` has the Lua; ``timeline`` draws a transcript; ``descriptors`` says what a
descriptor is, ``words`` what a payload says; ``faults`` are those that are asked for. What a message means and which
rule it breaks is told by ``vhostuser.protocol.witness``.
"""
