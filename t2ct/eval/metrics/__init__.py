"""What is measured, one family a file: pure functions over arrays of features, scores, labels and embeddings."""
