"""Studies of a trained network: one in each file, chosen by `study=NAME`."""
