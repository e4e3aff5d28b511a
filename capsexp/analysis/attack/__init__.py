"""Attacks on a network's input images, within an L-infinity ball. They are independent of runs."""
