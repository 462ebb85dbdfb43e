"""Config: typed blocks, supported keys of DeepSpeed, precision, and the validated settings of an engine."""
