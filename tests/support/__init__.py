"""What several test files need: tiny models, runs, ranks, faults. No tests are here."""
