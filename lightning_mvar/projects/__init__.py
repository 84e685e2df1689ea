"""Projects for one's own pictures: a folder with the configuration of each command, written by `lightning-mvar new`."""
