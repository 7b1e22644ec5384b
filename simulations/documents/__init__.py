"""`python -m simulations.documents reference|figures`: pages and figures of docs/ from code and data."""
