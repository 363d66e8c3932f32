"""The rows of peers.py: each trains the same model on the same batches in its own way."""
