"""Cross-entropy over the whole vocabulary, from decoder states or logits."""
