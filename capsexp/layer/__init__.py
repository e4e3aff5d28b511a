"""Capsule layers: they make votes and call the routing that they get."""
