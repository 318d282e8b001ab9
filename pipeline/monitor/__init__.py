"""What a training run reports: console, JSON lines, TensorBoard, Weights & Biases."""
