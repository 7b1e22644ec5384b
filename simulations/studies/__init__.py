"""Studies of the papers' claims, each side by side with its baselines, paired by seed and phantom draw."""
