"""cogsym: train the outer layers of a language model, freeze the middle, and see what each layer is for."""

__version__ = "0.1.0"
