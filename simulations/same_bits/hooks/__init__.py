"""Loaded into every process of a compared run, from outside of the code that is compared."""
