"""Files, locks and formats: everything that touches a disk or a network."""
