"""What policies compact with: Attention Matching, eviction, and the selectors of slots they share."""
