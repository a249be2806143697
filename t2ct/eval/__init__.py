"""Evaluation: image measurements on chest CTs (`measure`) and whether a model does what its prompt says (`listens`)."""
