"""``vhostuser postcopy``: a laboratory for the postcopy of back-ends, on one machine and without a virtual machine.

It plays the source and the destination of a migration for any vhost-user-blk back-end, drives its disk while pages of
guest memory are missing, checks every byte, and says what the back-end did wrong. (``tools/lab`` is something else: a
bench with real virtual machines.)

* ``options``: the command line
* ``plan``: what lies where in guest memory and on the disks, and which requests are made; decided before anything runs
* ``record``: what was seen of a run
* ``rules``: what a back-end has to do, and the judgement of a record by it
* ``truth``: what guest memory and disks must hold
* ``subject``, ``guest``, ``source``, ``pages``, ``load``, ``handshake``: what a run is made of
* ``bench``: all of that put together
* ``run``, ``watch``: the run itself
* ``report``, ``plot``, ``progress``: for people and programs
* ``command``: the way in

``plan``, ``record``, ``rules``, ``truth`` and ``report`` do no input or output.
"""
