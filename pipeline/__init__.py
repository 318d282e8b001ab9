"""Vastscale: super-resolution training. Importing the package imports nothing else."""
