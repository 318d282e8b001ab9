"""Walk, sample, judge and clean a dataset on disk."""
