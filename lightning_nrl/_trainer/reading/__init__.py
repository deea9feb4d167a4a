"""Reads the known, unseen and calibration data of a trainer.

In: data loaders, hooks and options. Out: sources that read each sample once and in order.
"""
