"""The HTML page of a dataset."""
