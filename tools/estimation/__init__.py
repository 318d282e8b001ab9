"""What an image shows of the degradations that it went through: arrays in, numbers out."""
