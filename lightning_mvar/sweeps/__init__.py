"""Many runs from one file: the grid it describes, each run's folder and records, and ways to run them."""
