"""From words on a command line to objects."""
