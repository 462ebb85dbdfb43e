"""Config blocks: their types, what of DeepSpeed's own keys is honoured, and precision."""
