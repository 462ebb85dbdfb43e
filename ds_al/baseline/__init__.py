"""The backprop twin: DeepSpeed's pipeline engine and data parallel training, for comparison."""
