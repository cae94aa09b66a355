"""Building blocks of the networks: attention, rotary positions, norms, embeddings, feed-forward, modulated blocks."""
