"""The objective `view-regression`."""
