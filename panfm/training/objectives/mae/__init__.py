"""The objective `mae`."""
