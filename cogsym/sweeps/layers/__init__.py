"""Which layers: configurations, what they share, and searches for them."""
