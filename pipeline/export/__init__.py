"""Export trained networks to files for other programs. Needs no GPU and no DeepSpeed."""
