"""elastify: a latent interface for pretrained diffusers transformers."""
