"""`cogsym generate`."""

from __future__ import annotations

from typing import Annotated

import typer

from cogsym.commands.options import option, quiet_transformers


def generate(
    model: Annotated[str, typer.Argument(help="A model folder (safetensors) or the id of a model on the hub.")],
    prompt: Annotated[list[str], option("What the model goes on from; repeatable.")],
    tokens: Annotated[int, option("Write at most so many tokens.", "--tokens")] = 100,
    temperature: Annotated[float, option("Draw tokens at this temperature; 0 takes the most likely.")] = 0.0,
    top_p: Annotated[float, option("Draw from the tokens that reach this probability.")] = 1.0,
    seed: Annotated[int, option("Of the draws.")] = 0,
    separator: Annotated[
        str | None, option("The token before each prompt; the tokenizer's bos or eos where it is left out.")
    ] = None,
) -> None:
    """Let a model write, to see what it has learned.

    Prints each prompt and what the model writes behind it as it comes, to the token that ends a text. A document begins
    with the separator that `cogsym train` put there.
    """
    quiet_transformers()
    import torch
    from transformers import GenerationConfig, TextStreamer, set_seed

    from cogsym.data import separator_id
    from cogsym.errors import SettingError
    from cogsym.models.loading import load_model, load_tokenizer
    from cogsym.sweeps.engine.sampling import Sampling

    if tokens < 1:
        raise SettingError("tokens", f"is {tokens}, expected a whole number above 0.")
    sampling = Sampling(temperature, top_p, seed)  # raises
    tokenizer = load_tokenizer(model)
    begin = separator_id(tokenizer, separator)
    network = load_model(model).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    drawn = {"do_sample": True, "temperature": temperature, "top_p": top_p} if sampling.temperature else {}
    ends = [i for i in {tokenizer.eos_token_id, begin} if i is not None]
    settings = GenerationConfig(max_new_tokens=tokens, eos_token_id=ends, pad_token_id=ends[0], **drawn)
    set_seed(seed)
    for text in prompt:
        ids = [begin, *tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids]
        streamer = TextStreamer(tokenizer, skip_special_tokens=True)
        given = torch.tensor([ids], device=network.device)
        network.generate(given, attention_mask=torch.ones_like(given), generation_config=settings, streamer=streamer)
