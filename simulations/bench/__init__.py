"""Questions of speed and size, both sides in one run."""
