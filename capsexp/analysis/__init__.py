"""What is asked of a trained network, and the tools that studies share."""
