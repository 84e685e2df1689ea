"""The page of `serve`."""
