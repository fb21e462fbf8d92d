"""Trackers: metrics.csv, TensorBoard, Weights & Biases, and any logger of Lightning."""
