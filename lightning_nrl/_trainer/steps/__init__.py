"""Finds out by a module's own steps what it predicts when it is deployed.

In: a module, its steps and sources. Out: adapters that predict, the layers that are called, and
what proves the logits.
"""
