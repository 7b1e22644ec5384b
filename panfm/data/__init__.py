"""Images: manifest, checks, reading, intensity rules, cache, labels, phantom cohorts."""
