"""Explains why two results of `evaluate` differ, and estimates how much each difference contributes."""
