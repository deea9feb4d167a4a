"""Logs repairs, releases and trainings.

In: a report and the loggers of a trainer. Out: scalars, figures, pictures, text, tables, files,
hyperparameters.
"""
