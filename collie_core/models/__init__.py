"""Models: finding a provider, loading and writing weights, the forward pass and generation."""
