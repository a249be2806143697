"""Judges: what one says of a volume (`verdict`), how good it is (`judged`), others trained for a table (`relearn`)."""
