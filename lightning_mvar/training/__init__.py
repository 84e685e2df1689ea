"""Lightning modules, datamodules, optimizer and strategies."""
