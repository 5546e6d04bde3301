"""A throw-away Ceph cluster and a throw-away kernel on any Debian machine, for the demo, the tests and the benchmark."""
