"""Sampling: settings, engines, pictures."""
