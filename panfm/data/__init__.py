"""Images: manifest, checks, readers, intensity rules, cache, labels."""
