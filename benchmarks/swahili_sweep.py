"""Which layers of SmolLM2-135M understand Swahili after the CogSym recipe, and which ones speak it.

    python benchmarks/swahili_sweep.py --model MODEL_FOLDER --data TEXT_FOLDER --work SWEEP

MODEL_FOLDER is a model that `benchmarks/swahili.py` made. Layers are skipped from the input side, from the output side
and from both, 466 configurations, on XCOPA in Swahili (150 questions), the English side of GlobalVoices given the
Swahili one (40 pairs), and NTREX in Swahili (24 sentences). Some five minutes of one core; the same command goes on
where it was stopped. The pictures are those of `cogsym plot SWEEP`.
"""

from __future__ import annotations

from functools import partial

from cogsym import SweepSettings, sweep
from cogsym.bench.case import Case, CaseSpec, Line, Setting
from cogsym.bench.models import shape_of
from cogsym.bench.report import Table
from cogsym.bench.study import Study, main

MEMORY = 120_000_000  # of states at a time, so that a piece takes about half a minute
LIMITS = {True: (150, 24, 40), False: (4, 2, 2)}  # documents of each task, by whether the run is full
DIRECTIONS = ("none", "input", "output", "all")
COLUMNS = ["task", "metric", "direction", "k", "documents", "value", "low", "high"]


def cases(setting: Setting) -> list[CaseSpec]:
    (model,) = setting.models
    return [CaseSpec(shape_of(model).name, partial(case, model, setting))]


def case(model: str, setting: Setting) -> Case:
    """Sweep, or go on, and note what came of it."""
    choices, sentences, pairs = LIMITS[setting.full]
    tasks = [
        f"xcopa-sw:{setting.data}/xcopa/sw.test.jsonl,name=XCOPA-sw,limit={choices}",
        f"text:{setting.data}/ntrex-128/swa.jsonl#text,name=NTREX-sw,language=sw,limit={sentences}",
        f"sw-en:{setting.data}/globalvoices-en-sw/test.jsonl,name=sw to en,limit={pairs},shots=0,"
        "metrics=[bits_per_byte]",
    ]
    settings = SweepSettings(separator="<|endoftext|>" if setting.full else None, memory_budget=MEMORY)
    resume = (setting.work / "sweep.json").exists()
    found = sweep(model, "input,output,grid", tasks, setting.work, settings=settings, resume=resume)
    assert found is not None
    ends = found[found["direction"].isin(DIRECTIONS)]
    facts = {
        "configurations": found["configuration"].nunique(),
        "values": ends[COLUMNS].round(4).to_dict("records"),
    }
    return Case(facts=facts)


def table(lines: list[Line]) -> Table:
    """Each metric with all layers, and without some first or last ones."""
    values: dict[str, dict[tuple[str, int], float]] = {}
    for v in lines[0]["facts"]["values"]:
        values.setdefault(f"{v['task']}, {v['metric']}", {})[v["direction"], v["k"]] = v["value"]
    asked = {"all layers": ("none", 0)} | {
        f"without the {side} {k}": (direction, k)
        for k in (1, 4)
        for side, direction in (("first", "input"), ("last", "output"))
    }
    rows = [
        [name, *(f"{of[which]:.2f}" if which in of else "" for which in asked.values())] for name, of in values.items()
    ]
    return ["", *asked], rows


STUDY = Study("swahili_sweep", cases, table, pictures=(), needs=("model", "data", "work"))

if __name__ == "__main__":
    main(STUDY, __doc__)
