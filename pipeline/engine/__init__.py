"""Forward, backward and update of one network, by DeepSpeed or by Accelerate."""
