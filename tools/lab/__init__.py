"""A bench for virtual machines: a small Linux guest, QEMU without KVM, live migration, and what can be observed of it.

The demo and the tests against real QEMU are written with it. Nothing here knows about the library under
test: a back-end is a command line that serves a Unix socket.

* ``image``: what the guest boots from, made on the spot
* ``journal``, ``process``: child processes that cannot outlive us, and what they say
* ``guest``: shell commands in a running guest, also while it migrates
* ``backend``, ``machine``: a vhost-user back-end process and a QEMU process
* ``namespace``: a network of the host's that nobody else sees
* ``migration``: precopy, postcopy, recovery
* ``trace``, ``maps``, ``observation``: what QEMU, the kernel and the back-end tell of faults and of who maps what
* ``workload``: what the guest does with its disk and memory, and how it is known that it did it right
* ``memory``: which pages a machine's memory has, and that the kernel takes none of them back
* ``hugepages``: free 2 MiB pages
* ``bench``: one test's directory, processes and disks, released together
"""

from vhostuser.tools.lab.errors import LabError

__all__ = ["LabError"]
