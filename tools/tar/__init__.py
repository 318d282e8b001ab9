"""Read tar archives, even hostile ones, as streams."""
