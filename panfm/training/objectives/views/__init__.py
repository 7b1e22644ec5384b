"""The objective `views`."""
