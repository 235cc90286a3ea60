"""Checks: parity (`verify`), speed (`bench`), a built engine's numbers (`engines`), and the node to blame (`blame`)."""
