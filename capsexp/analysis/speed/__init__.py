"""Speed and memory of training and inference."""
