"""Which layers: configurations, what they share, and searches for them."""

from cogsym.sweeps.layers import beam  # noqa: F401  # registers the searches that come with cogsym
