"""A repair written to loggers: scalars, figures, pictures, text, tables, files, a row of hyperparameters."""
