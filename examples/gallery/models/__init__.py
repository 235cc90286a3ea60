"""One file per model, in the style of those who write such models."""
