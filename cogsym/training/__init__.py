"""Training with a frozen middle."""
