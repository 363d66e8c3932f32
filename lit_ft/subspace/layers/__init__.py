"""Layers whose weights move in a subspace, and the thin products of their backward passes."""
