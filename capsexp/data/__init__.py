"""From files to batches: what all datasets share."""
