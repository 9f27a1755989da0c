"""Floor 6: a trained model at work."""
