"""The routing of a trained network, pass by pass."""
