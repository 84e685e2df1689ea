"""Sweeps: the grid that a sweep file describes, the folder and records of each cell, and the launchers that run it."""
