"""Drawing images, and sets of drawn images."""
