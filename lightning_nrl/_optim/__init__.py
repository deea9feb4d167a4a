"""Steps along gradients: distilled fits, polishes with an active set, and the whitening of layers.

In: a problem and weights to start from. Out: weights after the steps; the live model stays as it is.
"""
