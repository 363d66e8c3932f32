"""The comparison of runs: what `python -m lit_ft.compare` reads, computes and writes."""
