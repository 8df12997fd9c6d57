"""Measurements inside a network."""
