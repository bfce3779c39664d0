"""Tensors in files, folders that appear when they are complete, and the Hub as a source of both."""
