"""Figures that compare upscaled images."""
