"""File formats, locks and downloads."""
