"""The options of decoding, declared once. `t5lab.config` takes keys from here, so no jax."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Decoding:
  """How tokens are chosen: greedy by default, beam search if beams > 1, or else sampling.

  Each but `length` is a key of the config's `eval` section; all are options of `Lab.generate`.
  """
  length: int                # tokens to generate at most, EOS included
  beams: int = 1             # more than 1: beam search, which ignores the options of sampling
  alpha: float = 0.6         # length penalty of beam search [Wu et al. 2016]
  temperature: float = 0.    # 0: the most probable token
  top_k: int = 0             # sample from the k most probable tokens; 0: all
  top_p: float = 1.          # sample from the nucleus of this probability; 1: all
  seed: int = 0              # of sampling
  forced_first: int = -1     # token id that every output starts with (BART); -1: none


def defaults() -> dict:
  """{option: default} of all options but `length`."""
  return {f.name: f.default for f in dataclasses.fields(Decoding) if f.name != 'length'}
