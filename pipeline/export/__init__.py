"""Trained networks as files for others. Needs no GPU and no DeepSpeed."""
