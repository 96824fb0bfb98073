"""The share of tokens that each source gets."""
