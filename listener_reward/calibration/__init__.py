"""Maps from a judge's probabilities to how often people agree, and how the maps are fitted."""
