"""Techniques of the axis pruning: weights or channels removed."""
