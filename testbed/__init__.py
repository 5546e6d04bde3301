"""A throw-away Ceph cluster and kernel on any Debian machine, for demo, tests and benchmark."""
