"""Embedded data sets: their images ship with installed packages, so nothing is downloaded."""
