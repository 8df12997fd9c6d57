"""An image service whose budget follows the load: a pure policy, its simulator, and Ray Serve around a model."""

LOOPBACK = ("127.0.0.1", "localhost", "::1")  # Addresses that only this machine can reach.
