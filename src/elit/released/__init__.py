"""Published checkpoints as networks of this library: ELIT's own ELIT-SiT and SiT, and the original SiT and DiT."""
