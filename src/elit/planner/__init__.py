"""From a target to a plan: what this machine takes, what quality a sweep found, and the best of both."""
