"""The command `capsexp`."""
