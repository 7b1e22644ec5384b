"""A run's model for use elsewhere, one format per file; an export is read back and compared before it is named."""
