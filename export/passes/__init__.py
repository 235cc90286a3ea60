"""Changes to a graph. Each keeps the model's numbers; analyses never import them."""
