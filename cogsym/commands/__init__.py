"""What the commands of `cogsym` that have most options do; `cogsym.cli` lists all of them."""
