"""Proposes a run description from the headers of the sites' images, and tells what the run would cost."""
