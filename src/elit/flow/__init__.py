"""Rectified flow as algebra over tensors and callables; nothing here knows a model. t = 0 is noise, t = 1 data."""
