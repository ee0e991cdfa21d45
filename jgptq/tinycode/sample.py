"""Generates text with the embedded model: `python -m jgptq.tinycode.sample "def read_"`."""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from converters import load_hf
from jgptq.models import Decoder
from jgptq.models.memory import to_device
from jgptq.tinycode import FOLDER, SEQ_LEN


def continue_ids(model: Decoder, prompt: list[int], count: int, temperature: float, seed: int) -> list[int]:
    """Samples tokens one by one, without a cache. The context is padded to one length, so that it compiles once.

    Args:
      model: a decoder.
      prompt: ids to begin with, at least one.
      count: tokens to add; the result is at most `SEQ_LEN` tokens long.
      temperature: divides the logits.
      seed: seed of the sampling.

    Returns:
      The ids of the prompt and of its continuation.
    """

    @jax.jit
    def draw(tokens: jax.Array, last: jax.Array, key: jax.Array) -> jax.Array:
        return jax.random.categorical(key, model(tokens[None])[0, last] / temperature)

    ids = np.zeros(SEQ_LEN, np.int32)
    ids[: len(prompt)] = prompt
    stop = min(SEQ_LEN, len(prompt) + count)
    for position, key in zip(range(len(prompt), stop), jax.random.split(jax.random.key(seed), count), strict=False):
        ids[position] = draw(jnp.asarray(ids), jnp.asarray(position - 1), key)
    return ids[:stop].tolist()


def main() -> None:
    """Prints a continuation of a prompt."""
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="def read_")
    parser.add_argument("--model", default=FOLDER, help="a checkpoint with the same vocabulary, such as a quantized export")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    prompt = [tokenizer.bos_token_id, *tokenizer.encode(args.prompt)]
    ids = continue_ids(to_device(load_hf(args.model)), prompt, args.tokens, args.temperature, args.seed)
    print(tokenizer.decode(ids[1:]))


if __name__ == "__main__":
    main()
