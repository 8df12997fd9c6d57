"""What looks inside a network."""
