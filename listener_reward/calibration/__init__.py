"""From what a judge says to how often people agree: the maps, and how they are fitted."""
