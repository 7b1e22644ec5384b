"""The objective `supervised`."""
