"""Command-line tools that prepare data: scripts with `--help`. None imports torch at import."""
