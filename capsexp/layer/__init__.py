"""Capsule layers: they compute votes and pass them to a routing."""
