"""Costs of a forward, a sample and a training run, before one is started."""
