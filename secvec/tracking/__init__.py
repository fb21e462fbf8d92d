"""Where a run's numbers go besides its record: metrics.csv, TensorBoard, Weights & Biases, all by the same calls."""
