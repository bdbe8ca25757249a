"""The search for the weights of a merge: a space, an objective, trials that are kept, and CMA-ES."""
