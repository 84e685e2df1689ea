"""Web page of `serve`."""
