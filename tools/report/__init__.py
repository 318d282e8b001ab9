"""The HTML report on a dataset."""
