"""The options of decoding, declared once. `t5lab.config` takes keys from here, so no jax."""

from collections.abc import Iterable
import dataclasses
import math

from t5lab.errors import UsageError

# exact: T5X's beam search, which stops when no live hypothesis can win. The others are those of
# transformers: see beam.py.
EARLY_STOPPING = ('exact', 'false', 'true', 'never')


@dataclasses.dataclass(frozen=True)
class Decoding:
  """How tokens are chosen: greedy by default, beam search if beams > 1, or else sampling.

  Every field but `length` is a key of the config's `eval` section; all are options of
  `Lab.generate`. Names of transformers' GenerationConfig have its meaning. Ids are token ids.
  min_length, no_repeat_ngram_size and repetition_penalty count what the decoder has read as well:
  the start token of an encoder-decoder, the prompt of a decoder-only model.
  """
  length: int                # tokens to generate at most, EOS included
  max_total: int = 0         # decoder-only: tokens of prompt and output at most; 0: no limit
  beams: int = 1             # more than 1: beam search, which ignores the options of sampling
  alpha: float = 0.6         # beams: log p / ((5 + tokens) / 6)^alpha [Wu et al. 2016]
  length_penalty: float = 0.           # beams: not 0: log p / tokens^length_penalty, without alpha
  early_stopping: str = 'exact'        # beams: exact | false | true | never, see decoding/beam.py
  temperature: float = 0.    # 0: the most probable token
  top_k: int = 0             # sample from the k most probable tokens; 0: all
  top_p: float = 1.          # sample from the nucleus of this probability; 1: all
  min_p: float = 0.          # sample from tokens at least min_p times as probable as the best
  seed: int = 0              # of sampling
  stop_ids: tuple[int, ...] = ()       # ids that end a text; (): the vocabulary's end alone
  start: int = -1            # the decoder's first input; -1: model.start_id
  forced_first: int = -1     # id that every output starts with (BART, mBART); -1: none
  forced_last: int = -1      # id at the last place of an output that reaches its length; -1: none
  min_length: int = 0        # no end of a text before this many tokens were read
  min_new_tokens: int = 0    # no end of a text before this many tokens were generated
  suppress_tokens: tuple[int, ...] = ()             # ids that are never generated
  begin_suppress_tokens: tuple[int, ...] = ()       # ids that an output does not start with
  bad_words_ids: tuple[tuple[int, ...], ...] = ()   # sequences of ids that are never generated
  no_repeat_ngram_size: int = 0        # n: no n ids occur twice; 0: off
  repetition_penalty: float = 1.       # above 1: ids that were read are less probable

  def __post_init__(self):
    # Values from JSON are lists; as a static argument of jit, all must be hashable.
    ids = lambda value: tuple(map(int, value))
    for name in ('stop_ids', 'suppress_tokens', 'begin_suppress_tokens'):
      self._set(name, ids, 'token ids')
    self._set('bad_words_ids', lambda words: tuple(map(ids, words)), 'lists of token ids')
    object.__setattr__(self, 'early_stopping', str(self.early_stopping).lower())

    if self.early_stopping not in EARLY_STOPPING:
      raise UsageError(f'early_stopping must be one of {", ".join(EARLY_STOPPING)}, got '
                       f'{self.early_stopping!r}')
    if () in self.bad_words_ids:
      raise UsageError('bad_words_ids has an empty sequence')
    for name in ('max_total', 'min_length', 'min_new_tokens', 'no_repeat_ngram_size'):
      if getattr(self, name) < 0:
        raise UsageError(f'{name} must be 0 or more, got {getattr(self, name)}')
    for name in ('forced_first', 'forced_last'):
      if getattr(self, name) in self.suppress_tokens:
        raise UsageError(f'{name}={getattr(self, name)} is among suppress_tokens')
    if not 0 <= self.min_p <= 1:
      raise UsageError(f'min_p must be between 0 (off) and 1, got {self.min_p}')
    if not 0 < self.repetition_penalty < math.inf:
      raise UsageError(f'repetition_penalty must be a number above 0 (1 is off), got '
                       f'{self.repetition_penalty}')
    if not math.isfinite(self.length_penalty):
      raise UsageError(f'length_penalty must be a number, got {self.length_penalty}')

  def _set(self, name, convert, what):
    try:
      object.__setattr__(self, name, convert(getattr(self, name)))
    except (TypeError, ValueError) as e:
      raise UsageError(f'{name} must be a list of {what}, got {getattr(self, name)!r}') from e

  def check_ids(self, vocab_size: int) -> None:
    """UsageError for a token id that a model with this many rows does not have."""
    words = (i for word in self.bad_words_ids for i in word)
    groups: dict[str, Iterable[int]] = {
        'stop_ids': self.stop_ids, 'suppress_tokens': self.suppress_tokens,
        'begin_suppress_tokens': self.begin_suppress_tokens, 'bad_words_ids': words}
    for name in ('start', 'forced_first', 'forced_last'):
      groups[name] = [i] if (i := getattr(self, name)) != -1 else []
    for name, ids in groups.items():
      for i in ids:
        if not 0 <= i < vocab_size:
          raise UsageError(f'{name} must be less than the vocabulary size, {vocab_size}, and not '
                           f'negative, got {i}')

# {option: (another, which says the same in another way or would leave this one without effect, and
# the value that turns it off)}. Giving the first turns the other off.
REPLACES = {'length': ('max_total', 0), 'alpha': ('length_penalty', 0.),
            'length_penalty': ('alpha', 0.), 'min_new_tokens': ('min_length', 0),
            'temperature': ('beams', 1)}


def defaults() -> dict:
  """{option: default} of all options but `length`."""
  return {f.name: f.default for f in dataclasses.fields(Decoding) if f.name != 'length'}
