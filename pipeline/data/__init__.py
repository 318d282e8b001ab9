"""Training data: from dataset folders to batches on the device."""
