"""Embedded data sets, whose images ship with installed packages, so nothing is downloaded."""
