"""Changes of the logits before a token is chosen: pure functions, composed once per setting.

Each is (logits[B, V], Read, …) -> logits[B, V] and follows the class of transformers' generation/
logits_process.py (5.24) that its docstring names. Greedy decoding and sampling apply them to
logits, beam search to log-probabilities, as transformers does: a repetition penalty differs.
"""

from collections.abc import Callable, Sequence
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t5lab.decoding.options import Decoding

Array = jax.Array


class Read(NamedTuple):
  """The state of the rows when their next token is chosen.

  ids: int[B, S], the start token or the prompt and then the output; the first `count` count.
  new: int[B] or int[], tokens generated so far. left: likewise, tokens that may follow.
  """
  ids: Array
  count: Array | int
  new: Array | int
  left: Array | int


Process = Callable[[Array, Read], Array]


def compose(options: Decoding, stops: Sequence[int], *, reads_start: bool) -> Process | None:
  """The functions that these options need, in transformers' order; None if none is needed.

  stops: the ids that end a text. reads_start: whether outputs follow a single start token, as in an
  encoder-decoder, so that a first token may be forced.
  """
  o, used = options, []
  use = lambda function, *args: used.append(functools.partial(function, *args))
  if o.repetition_penalty != 1:
    use(penalize_repetition, o.repetition_penalty)
  if o.no_repeat_ngram_size:
    use(ban_repeated_ngrams, o.no_repeat_ngram_size)
  if words := [word for word in o.bad_words_ids if word not in [(i,) for i in stops]]:
    use(ban_sequences, words)
  if o.min_length:
    use(ban_if, stops, lambda read: read.count < o.min_length)
  if o.min_new_tokens:
    use(ban_if, stops, lambda read: read.new < o.min_new_tokens)
  first_is_forced = reads_start and o.forced_first >= 0
  if first_is_forced:
    use(force_if, o.forced_first, lambda read: read.new == 0)
  if o.forced_last >= 0:
    use(force_if, o.forced_last, lambda read: read.left == 1)
  if o.suppress_tokens:
    use(ban_if, o.suppress_tokens, lambda read: True)
  if o.begin_suppress_tokens:
    # The token after a forced one is the first that is chosen.
    use(ban_if, o.begin_suppress_tokens, lambda read: read.new == int(first_is_forced))
  if not used:
    return None

  def process(logits, read):
    for function in used:
      logits = function(logits, read)
    return logits
  return process


def _where(condition, then, otherwise):
  """jnp.where with a condition for each row: bool[B] or a scalar."""
  return jnp.where(jnp.reshape(condition, (-1, 1)), then, otherwise)


def _ban(logits, ids, is_banned):
  """-inf at ids int[B, n] where is_banned bool[B, n]."""
  rows, vocab = logits.shape
  # An id that is not banned is written beyond the vocabulary, that is nowhere.
  targets = jnp.where(is_banned, ids, vocab)
  return logits.at[jnp.arange(rows)[:, None], targets].set(-jnp.inf, mode='drop')


def ban_if(ids: Sequence[int], condition: Callable, logits: Array, read: Read) -> Array:
  """Bans these ids in the rows where condition(read) holds.

  MinLength-, MinNewTokensLength-, SuppressTokens- and SuppressTokensAtBeginLogitsProcessor.
  """
  is_listed = np.isin(np.arange(logits.shape[-1]), ids)
  return _where(condition(read), jnp.where(is_listed, -jnp.inf, logits), logits)


def force_if(token: int, condition: Callable, logits: Array, read: Read) -> Array:
  """Leaves one id, with log p 0, where condition(read) holds. ForcedBOS-, ForcedEOSToken-."""
  forced = np.where(np.arange(logits.shape[-1]) == token, 0., -np.inf)
  return _where(condition(read), forced.astype(logits.dtype), logits)


def penalize_repetition(penalty: float, logits: Array, read: Read) -> Array:
  """Divides positive logits of ids that were read by the penalty and multiplies negative ones.

  RepetitionPenaltyLogitsProcessor. [Keskar et al. 2019, 4.1, without its restriction to lists]
  """
  rows, vocab = logits.shape
  is_read = jnp.arange(read.ids.shape[1]) < read.count
  targets = jnp.where(is_read, read.ids, vocab)
  seen = jnp.zeros((rows, vocab), bool).at[jnp.arange(rows)[:, None], targets].set(
      True, mode='drop')
  return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def ban_repeated_ngrams(n: int, logits: Array, read: Read) -> Array:
  """Bans each id that would end n ids which were read before. NoRepeatNGramLogitsProcessor.

  [Paulus et al. 2018, 2.5]
  Example: after 5 6 7 5 6, n = 3 bans 7.
  """
  starts = read.ids.shape[1] - n + 1
  if starts < 1:
    return logits
  tail = jax.lax.dynamic_slice_in_dim(read.ids, read.count - (n - 1), n - 1, axis=1)
  repeats = jnp.arange(starts) + n - 1 < read.count     # their last id was read: bool[starts]
  repeats = jnp.broadcast_to(repeats, (len(logits), starts))
  for k in range(n - 1):
    repeats &= read.ids[:, k:k + starts] == tail[:, k:k + 1]
  return _ban(logits, read.ids[:, n - 1:], repeats)


def ban_sequences(words: Sequence[Sequence[int]], logits: Array, read: Read) -> Array:
  """Bans the last id of each word after its other ids. NoBadWordsLogitsProcessor."""
  for length in sorted(set(map(len, words))):
    table = np.array([word for word in words if len(word) == length], np.int32)
    if length > read.ids.shape[1] + 1:
      continue
    tail = jax.lax.dynamic_slice_in_dim(read.ids, read.count - (length - 1), length - 1, axis=1)
    follows = jnp.all(tail[:, None] == table[:, :-1], axis=-1) & (read.count >= length - 1)
    last = jnp.broadcast_to(table[:, -1], follows.shape)
    logits = _ban(logits, last, follows)
  return logits
