"""Commands of the command line, one module per command; only the command line imports them."""
