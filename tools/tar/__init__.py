"""Read tar archives, hostile ones too, as streams."""
