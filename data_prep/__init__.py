"""From raw images to a sharded corpus, and the corpus as training reads it."""
