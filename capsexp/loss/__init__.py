"""One loss per file: loss(output, batch, step) -> {term: scalar}; the terms add up to the loss."""
