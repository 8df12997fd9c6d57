"""The networks, one backbone a file, all built from `layers` and the one `interface`."""
