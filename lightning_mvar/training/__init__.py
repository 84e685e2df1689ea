"""LightningModules, datamodules, optimizer and strategies."""
