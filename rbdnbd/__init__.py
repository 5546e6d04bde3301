"""Map Ceph RBD images to Linux block devices through an in-process NBD server."""

__version__ = "0.1.0"
