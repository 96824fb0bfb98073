"""Techniques of the axis quantization: fewer bits a weight."""
