"""The benchmark suite: what the toolkit gains on the machine it runs on, beside the alternatives at their best.

`models` names the shapes, `method` is how everything is timed and counted, `case` is one thing that is measured, and
`competitor` whatever it is set beside. `ops`, `train`, `sweep`, `generate` and `install` are the questions; training is
compared with `trainers`, sweeps with `loops`, which are timed on a part (`sampled`). `run` measures, `report` shows and
writes, `compare` tells a regression from noise between two result files.
"""
