"""Training: one loop, and a small file on it for each network."""
