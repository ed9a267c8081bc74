"""How good reconstructions and samples are, as numbers."""
