"""Commands that prepare data, each a script with `--help`. They need no torch."""
