"""Techniques of the axis packing: how documents become the rows of a step."""
