"""Network-independent tensor operations: state-space scans and attention over packed scales."""
