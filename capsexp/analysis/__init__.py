"""Evaluation of trained networks, and the tools that studies share."""
