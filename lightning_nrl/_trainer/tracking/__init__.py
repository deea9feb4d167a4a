"""Writing a repair to loggers: numbers to any of them, and to those that can show it what else helps to judge it.

In: a report and the loggers of a trainer. Out: scalars, figures, pictures, text, tables, files, a row of
hyperparameters. A logger that fails costs nothing but a warning.
"""
