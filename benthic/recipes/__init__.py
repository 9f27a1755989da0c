"""Whole runs as functions that return a TrainConfig."""
