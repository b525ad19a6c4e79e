"""Trains a reasoner on trl: listener-shaped GRPO, and the supervised baseline it is measured against."""
