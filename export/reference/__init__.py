"""The reference STCA: its config, its checkpoints, its torch module."""
