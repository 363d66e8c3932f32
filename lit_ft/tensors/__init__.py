"""Tensors in parts: sharded over ranks, in blocks of rows, in 8 bits, rounded."""
