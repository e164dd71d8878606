"""A recipe's train step beside the same work in PyTorch: what each needs of a card. PyTorch's half is in twin/."""
