"""Tables of inputs, numbers and faults: what a user may pass, and what has to happen; shown in docs/robustness.md."""
