"""Frames of videos, for training."""
