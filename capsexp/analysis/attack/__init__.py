"""Attacks on the pictures that a network gets, within an L-infinity ball. They know nothing of runs."""
