"""What training programs share: text, order of rows, steps, checkpoints, metrics, ranks."""
