"""Decoding: what a model computes of new tokens when the earlier ones are in a cache."""
