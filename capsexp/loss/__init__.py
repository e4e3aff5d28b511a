"""One loss per file: loss(output, batch, step) -> {term: scalar}; the terms add up to the loss.

`multi_label` says whether a picture may show several classes; a loss that does not say so takes one.
"""
