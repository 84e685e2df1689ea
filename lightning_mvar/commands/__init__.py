"""One module for each command of the command line. Nothing else imports them."""
