"""From a network to samples."""
