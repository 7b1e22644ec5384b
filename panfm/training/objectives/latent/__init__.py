"""The objective `latent`."""
