"""What ships to try the toolkit with: a generated log, a training script, a trained checkpoint."""
