"""The self-supervised objectives, one folder for each: options, loss and heads."""
