"""A recipe's train step beside the same work in PyTorch: the memory of both, and the time."""
