"""Working without a network: what a recipe needs, a folder that holds it all, and the check that it does."""
