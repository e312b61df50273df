"""The benchmark suite: what the toolkit gains on the machine it runs on, beside the alternatives at their best.

`models` names the shapes, `method` is how everything is timed and counted, `case` is one thing that is measured;
`ops`, `train` and `install` are the questions, `competitors` whom training is compared with; `run` measures, `report`
shows and writes, `compare` tells a regression from noise between two result files.
"""
