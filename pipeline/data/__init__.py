"""From files to batches: which files train, where their pixels lie, and how they reach the
device."""
