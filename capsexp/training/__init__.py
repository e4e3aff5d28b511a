"""One run: the training loop and everything that it writes."""
