"""The parts of `overhead.py`, one a file: `measure()` returns rows for a table."""
