"""Measures of how near SR is to HR."""
