"""Check, clean and measure datasets."""
