"""Repairs, releases and trainings written to loggers.

In: a report and the loggers of a trainer. Out: scalars, figures, pictures, text, tables, files, hyperparameters.
"""
