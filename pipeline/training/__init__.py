"""Train: build a run, loop over its steps, validate, report."""
