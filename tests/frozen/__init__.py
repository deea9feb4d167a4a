"""Results that a change of form must not change; see `python -m tests.frozen --help`."""
