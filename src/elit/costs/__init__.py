"""What a forward, a sample and a training run cost, before one is started."""
