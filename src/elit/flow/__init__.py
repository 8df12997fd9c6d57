"""Rectified flow as algebra over tensors and callables; independent of any model. t = 0 is noise, t = 1 data."""
