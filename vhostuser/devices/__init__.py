"""Devices that come with the library. They know ``vhostuser.device`` and nothing of sessions and sockets."""
