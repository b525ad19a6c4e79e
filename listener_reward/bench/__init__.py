"""`listener-reward bench`: what the shared prefix costs beside plain transformers and stock trl; random weights."""
