"""How a layer computes: compiled, or with activations recomputed."""
