"""One loss per file: a function of plain tensors, and the class that a config builds.

A loss object is called as loss(output, batch, step) -> {term: scalar}; the terms add up to the loss. Its
`multi_label` says whether an image may show several classes; a loss without it takes one class per image.
"""
