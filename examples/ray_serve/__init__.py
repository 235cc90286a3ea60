"""Several servers behind one door, with Ray Serve."""
