"""Whole runs of training, from data to a page or to weights: the demo, and the making of the embedded checkpoints."""
