"""Tensors a part at a time: sharded over ranks, in blocks of rows, in 8 bits, rounded."""
