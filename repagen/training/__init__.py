"""Training: typed configurations, checkpoints, EMA, optimiser, and one readable loop per program."""
