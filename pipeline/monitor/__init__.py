"""Reporting of a training run: console, JSON lines, TensorBoard, Weights & Biases."""
