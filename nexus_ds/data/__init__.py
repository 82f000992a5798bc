"""Text in: corpora, mixtures and domain embeddings."""
