"""Training on one device: losses, optimiser, balancing, run folder, resume."""
