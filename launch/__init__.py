"""Start training on this machine or on several. Importing this package imports nothing else."""
