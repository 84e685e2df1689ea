"""The web page of `serve`."""
