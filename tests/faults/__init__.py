"""Real faults: signals, kills, full disks, torn saves, damaged files, poisoned pickles."""
