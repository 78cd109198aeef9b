"""Tests for claims about rows: pure functions on plain sequences, without Flower, Ray or PyTorch.

SciPy is imported inside the functions that use it, so importing this package is cheap.
"""
