"""Draw comparison figures of upscaled images."""
