"""Generates reference pages and figures of docs/: `python -m simulations.documents reference|figures`."""
