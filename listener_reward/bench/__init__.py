"""`listener-reward bench`: the shared prefix against plain transformers and stock trl, side by side in one run."""
