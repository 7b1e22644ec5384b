"""`python -m simulations.documents reference|figures`: the pages and figures of docs/ that are made from code and data."""
