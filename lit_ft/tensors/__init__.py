"""Tools for tensors: shards, blocks of rows, 8-bit state and stochastic rounding."""
