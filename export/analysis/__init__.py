"""What is known of a graph without changing it: scopes, sizes and work, the cut, which rows depend on which."""
