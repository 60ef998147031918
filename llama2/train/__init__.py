"""Training: one loop, its optimizer, objectives, data parallelism, hooks and checkpoints."""
