"""Fast paths of the routing algorithms, each held by tests to the plain one."""
