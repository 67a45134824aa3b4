"""vhost-user for Python.

Nothing is imported here: ``vhostuser.protocol`` must be usable without the compiled module. Start with

* ``vhostuser.device.Device`` and ``vhostuser.backend.Backend`` to write a back-end,
* ``vhostuser.frontend.Frontend`` to drive one, ``vhostuser.testing`` to test one,
* ``vhostuser.protocol`` for the messages alone.
"""
