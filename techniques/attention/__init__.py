"""Techniques of the axis attention: how softmax(QK')V is computed."""
