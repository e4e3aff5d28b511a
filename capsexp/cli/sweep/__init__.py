"""Sweeps: their folder, and the launcher that gives each job a process of its own."""
