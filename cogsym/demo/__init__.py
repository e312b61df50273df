"""The embedded demo: a small base model adapted to a generated language, in minutes and without a network."""
