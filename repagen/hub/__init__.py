"""The Hub: fetching at one commit, looking at files before they are used, publishing with a model card."""
