"""The objective `dino`."""
