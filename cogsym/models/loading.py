"""Load a model and its tokenizer from a folder or the hub: safetensors only, no remote code, nothing left at random."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from cogsym.errors import CogsymError
from cogsym.records import check_file, reason

_MOST_LAYERS = 1000  # several times the deepest language model's; building a million takes hours
_POSITIVE = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_size",
    "head_dim",
    "vocab_size",
)


def load_model(name: str | Path, dtype: torch.dtype | None = None) -> Any:
    """A decoder language model from a local folder or a hub id.

    Args:
        name: a folder that `save_pretrained` wrote, or the id of a model on the hub.
        dtype: of the weights; None takes the checkpoint's own.

    Raises:
        CogsymError: no such folder, no safetensors in it, a damaged file, weights that are missing or do not fit.
    """
    folder = check_model_folder(name)
    load_config(name)  # what is wrong with it is told better before the model is built
    loaded: Any
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            folder or name,
            dtype=dtype or "auto",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:  # transformers raises AttributeError, KeyError, AssertionError ... for what it is given
        why = _one_line(error)
        if "ignore_mismatched_sizes" in why:  # and the weights are in a report that goes to the log
            why = "its weights have other shapes than config.json gives them; take the files that belong together"
        raise CogsymError(f"The model {str(name)!r} does not load: {why}.") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        # transformers fills these in at random and only warns.
        raise CogsymError(
            f"The model {str(name)!r} lacks {len(missing)} of its weights, such as {missing[0]}; "
            "expected a complete checkpoint of a causal language model."
        )
    return model


def load_config(name: str | Path) -> Any:
    """The model's configuration, without its weights.

    Raises:
        CogsymError: there is none, or it is not understood.
    """
    folder = check_model_folder(name)
    try:
        written, _ = PreTrainedConfig.get_config_dict(folder or name)
        _check_config(name, {**written, **(written.get("text_config") or {})})
        return AutoConfig.from_pretrained(folder or name, trust_remote_code=False)
    except CogsymError:
        raise
    except Exception as error:
        raise CogsymError(f"The model {str(name)!r} is not understood: {_one_line(error)}.") from error


def checkpoint_dtype(name: str | Path) -> torch.dtype:
    """The precision of a model's weights on the disk: its configuration's, where that says one.

    Raises:
        CogsymError: as `load_config`.
    """
    dtype: torch.dtype | None = load_config(name).dtype
    if dtype is None:
        dtype = AutoModelForCausalLM.from_pretrained(
            check_model_folder(name) or name, dtype="auto", device_map="meta", use_safetensors=True
        ).dtype
    return dtype


def build_model(name: str | Path, config: Any, **options: Any) -> Any:
    """A causal language model with the weights that it has before it is trained, from its configuration.

    Args:
        name: of the model, for the error.
        config: as `load_config` gives it.
        options: of `AutoModelForCausalLM.from_config`.

    Raises:
        CogsymError: transformers cannot build it.
    """
    try:
        return AutoModelForCausalLM.from_config(config, **options)
    except Exception as error:
        raise CogsymError(f"The model {str(name)!r} cannot be built: {_one_line(error)}.") from error


def _check_config(name: str | Path, written: Mapping[str, Any]) -> None:
    for key in _POSITIVE:
        value = written.get(key)
        if isinstance(value, int) and value < 1:
            raise CogsymError(f"The config.json of {str(name)!r} has {key} {value}, expected a number above 0.")
    layers = written.get("num_hidden_layers")
    if isinstance(layers, int) and layers > _MOST_LAYERS:
        raise CogsymError(
            f"The config.json of {str(name)!r} has num_hidden_layers {layers}, expected at most {_MOST_LAYERS}."
        )
    for key, value in written.items():
        if key.endswith(("dropout", "pdrop")) and isinstance(value, (int, float)) and not 0 <= value <= 1:
            raise CogsymError(f"The config.json of {str(name)!r} has {key} {value}, expected a share from 0 to 1.")


def load_tokenizer(name: str | Path) -> Any:
    """The fast tokenizer that belongs to a model.

    Raises:
        CogsymError: there is none.
    """
    folder = check_model_folder(name)
    try:
        return AutoTokenizer.from_pretrained(folder or name, trust_remote_code=False)
    except Exception as error:
        raise CogsymError(
            f"The tokenizer of {str(name)!r} does not load ({_one_line(error)}); expected tokenizer.json and "
            "tokenizer_config.json beside the model."
        ) from error


def check_model_folder(name: str | Path) -> Path | None:
    """The local folder that `name` means, its files looked over; None for a hub id.

    Raises:
        CogsymError: `name` looks like a path and no folder is there, or the folder is no model in safetensors.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        looks = folder.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1
        if looks or folder.exists() or (len(folder.parts) > 1 and folder.parent.is_dir()):  # OUT/modle, mistyped
            raise CogsymError(f"There is no model folder {str(name)!r}; give a folder that save_pretrained wrote.")
        return None
    for path in folder.iterdir():
        check_file(path)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise CogsymError(
            f"The folder {str(name)!r} holds adapters without their model; save the model with the adapters merged "
            "(merge_and_unload), or give the peft model itself in Python."
        )
    if not (folder / "config.json").is_file():
        raise CogsymError(f"The folder {str(name)!r} holds no config.json; give a folder that save_pretrained wrote.")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CogsymError(
            f"The folder {str(name)!r} holds no .safetensors file and cogsym unpickles nothing; "
            "load the model where you trust it and save it again with save_pretrained."
        )
    for file in files:
        try:
            with safe_open(file, framework="numpy") as opened:  # for torch it would map the whole file for writing
                opened.keys()
        except OSError as error:
            raise CogsymError(f"{file} cannot be read ({reason(error)}); mend that and try again.") from error
        except SafetensorError as error:
            raise CogsymError(f"{file} is damaged ({_one_line(error)}); fetch or write it again.") from error
    return folder


def _one_line(error: BaseException) -> str:
    """The first paragraph of what a library says, without its dot."""
    paragraph = str(error).strip().partition("\n\n")[0]
    return " ".join(paragraph.split()).rstrip(".:") or type(error).__name__
