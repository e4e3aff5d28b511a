"""Sweeps: a folder of runs, and a launcher that runs each job in its own process."""
