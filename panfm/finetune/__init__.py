"""Fine-tuning: a pre-trained model and a few labels make a classifier, a regression or a segmentation."""
