"""What `lightning-mvar bench` measures: networks with random weights, on the machine at hand."""
