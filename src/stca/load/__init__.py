"""Traffic shaped like users': who comes back, how long their histories are, what arrives between their requests."""
