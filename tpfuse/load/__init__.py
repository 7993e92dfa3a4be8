"""Checkpoints read in slices: each rank reads what it keeps, in every layout.

transformers resolves the files, builds the model on the meta device, renames and converts, ties and initializes, as always.
tpfuse cuts the empty model, and puts between transformers and the files an object for each tensor that reads this rank's part
when it is asked for all.
"""

from .shares import Loading, load, loading_of

__all__ = ["Loading", "load", "loading_of"]
