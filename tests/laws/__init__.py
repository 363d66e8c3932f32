"""What holds across rooms: the nine laws of training in subspaces, and the other equalities.

`test_law_N_...` proves law N of docs/galore/laws.md (its anchor is `law-N`) on real steps. Besides:
layerwise updates are whole ones, micro-batches are one batch, and a resumed run never stopped.
"""
