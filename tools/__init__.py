"""Command-line tools that prepare data. Importing one does not import torch."""
