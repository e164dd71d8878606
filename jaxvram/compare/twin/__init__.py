"""The PyTorch side of the comparison: plain scripts for any Python that has torch (main.py says how they are run).

Nothing here imports jax or jaxvram, and nothing of jaxvram imports what is here: the two halves meet in two JSON texts.
"""
