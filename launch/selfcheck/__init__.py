"""Check a GPU or CPU with this project's own work, in minutes: `python -m launch.selfcheck`."""
