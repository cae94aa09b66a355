"""`repagen doctor`: what works on this machine, what is here, and whether a dataset or a model is sound."""
