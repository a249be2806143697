"""What a run shows: tables, figures, a page."""
