"""Config blocks: their types, DeepSpeed's keys that are honoured, and precision."""
