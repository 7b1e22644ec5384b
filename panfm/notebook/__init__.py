"""A trained model and the tables of runs for Python: what `panfm.load` and `panfm.runs` return."""
