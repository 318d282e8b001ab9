"""Measure which degradations an image shows: arrays in, numbers out."""
