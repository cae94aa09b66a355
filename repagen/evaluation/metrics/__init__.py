"""Metrics as functions of features: what a set of images is worth, once an extractor has looked at it."""
