"""Data sets whose images come with an installed package, without a download."""
