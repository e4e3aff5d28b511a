"""From the arguments of a command to objects."""
