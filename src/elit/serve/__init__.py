"""An image service whose budget follows the load: a pure policy, its simulator, and Ray Serve around a model."""
