"""Dyno: a dynamometer for LLM optimisation."""

__version__ = "0.1.0"
