"""Checks a machine's GPUs, or its CPU, by this project's own work, in some minutes: `python -m
launch.selfcheck`."""
