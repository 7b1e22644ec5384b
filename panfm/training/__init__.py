"""Local training: the trainer, self-supervised objectives and masking policies."""
