"""Why two results of `evaluate` differ: what is different, and how much of it the images at hand explain."""
