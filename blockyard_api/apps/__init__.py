"""Applications: what they are called, how they are set, who may see them."""
