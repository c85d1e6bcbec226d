"""Generation settings of Hugging Face: generation_config.json to our `eval` keys and back.

`transformers.generate` (5.24) reads generation_config.json alone; without one, the same keys of
config.json, where they were before there was another file; then its own defaults. Keys that are
neither read here nor listed in UNSUPPORTED change no output, and are kept for the way back.
"""

from collections.abc import Mapping
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from t5lab import config, files
from t5lab.data import vocab
from t5lab.decoding import options
from t5lab.errors import UsageError
from t5lab.models.families import TransformerConfig

NAME = 'generation_config.json'

# {key: the values that change nothing} of what no option here does. Only when sampling, only with
# beams, or always.
SAMPLING = {'typical_p': (1,), 'epsilon_cutoff': (0,), 'eta_cutoff': (0,), 'top_h': ()}
BEAMS = {'renormalize_logits': (False,), 'num_beam_groups': (1,), 'diversity_penalty': (0,),
         'constraints': (), 'force_words_ids': ()}
ALWAYS = {'encoder_repetition_penalty': (1,), 'encoder_no_repeat_ngram_size': (0,),
          'exponential_decay_length_penalty': (), 'sequence_bias': (), 'guidance_scale': (1,),
          'penalty_alpha': (0,), 'dola_layers': (), 'watermarking_config': (), 'stop_strings': (),
          'token_healing': (False,), 'max_time': (), 'num_return_sequences': (1,),
          'forced_decoder_ids': ()}
UNSUPPORTED = {**SAMPLING, **BEAMS, **ALWAYS}
# {key: (its type, its least value, our option)} of numbers that mean the same in both.
SAME = {
    'num_beams': (int, 1, 'beams'), 'length_penalty': (float, -math.inf, 'length_penalty'),
    'top_k': (int, 0, 'top_k'), 'top_p': (float, 0, 'top_p'), 'min_p': (float, 0, 'min_p'),
    'min_length': (int, 0, 'min_length'), 'min_new_tokens': (int, 0, 'min_new_tokens'),
    'no_repeat_ngram_size': (int, 0, 'no_repeat_ngram_size'),
    'repetition_penalty': (float, 0, 'repetition_penalty')}
IDS = ('suppress_tokens', 'begin_suppress_tokens')
KEYS = {*UNSUPPORTED, *SAME, *IDS, 'bad_words_ids', 'eos_token_id', 'bos_token_id', 'pad_token_id',
        'decoder_start_token_id', 'forced_bos_token_id', 'forced_eos_token_id', 'max_length',
        'max_new_tokens', 'do_sample', 'temperature', 'early_stopping'}
TOP_K = 50        # of transformers, where a file samples and does not say


@dataclasses.dataclass(frozen=True)
class Settings:
  """values: {key of `eval`: value}. raw: the content of a generation_config.json that says so.
  notes: a line for each setting that is not honoured."""
  values: dict[str, Any]
  raw: dict[str, Any]
  notes: tuple[str, ...] = ()


def raw_settings(generation: Mapping | None, hf_config: Mapping) -> dict[str, Any]:
  """The settings that transformers uses.

  generation: the content of generation_config.json; None if there is no such file. hf_config: that
  of config.json.
  """
  if generation is not None:
    return dict(generation)
  # Of a model made of others, the decoder's keys fill in what the outer ones leave open.
  inner = next((hf_config[key] for key in ('decoder', 'generator', 'text_config')
                if isinstance(hf_config.get(key), Mapping)), {})
  given = {key: value for source in (inner, hf_config) for key, value in source.items()
           if key in KEYS and value is not None}
  if hf_config.get('force_bos_token_to_be_generated') and 'bos_token_id' in given:
    given['forced_bos_token_id'] = given['bos_token_id']        # the first BARTs
  return given


def read(raw: Mapping, model: TransformerConfig, *, eos_id: int, default_eos: int,
         what: str = NAME) -> Settings:
  """Generation settings of a model that generates.

  eos_id: the end of a text by the vocabulary, for which eval.stop_ids need not be set. default_eos:
  by config.json, for settings without eos_token_id. what: the name of the file, for messages.
  Errors: UsageError for a value that is not of its type.
  """
  return _Reader(raw, model, what).read(eos_id, default_eos)


class _Reader:
  """Reads one file's settings; `values` and `notes` grow with each of them."""

  def __init__(self, raw, model, what):
    self.raw, self.model, self.what = raw, model, what
    self.values: dict[str, Any] = {}
    self.notes: list[str] = []

  def read(self, eos_id, default_eos) -> Settings:
    # What transformers does if a file says nothing: its beam search is not ours.
    self.values.update(alpha=0., length_penalty=1., early_stopping='false')
    self._read_ends(eos_id, default_eos)
    self._read_numbers()
    self._read_lengths()
    self._read_ids()
    self._read_unsupported()
    options.Decoding(length=1, **{k: v for k, v in self.values.items() if k != 'max_length'})
    return Settings(self.values, dict(self.raw), tuple(self.notes))

  def _note(self, key, reason):
    self.notes.append(f'{self.what}: {key}={_short(self.raw.get(key))} {reason}')

  def _wrong(self, key, expected) -> UsageError:
    return UsageError(f'{self.what}: {key} must be {expected}, got {_short(self.raw[key])}')

  # -- values of a type ---------------------------------------------------------------------------

  def _number(self, key, kind=int, least=-math.inf):
    """The number at `key`, or None for null."""
    value = self.raw.get(key)
    if value is None:
      return None
    ok = type(value) in (int, float) and max(least, -2**31) <= value < 2**31
    if not ok or (kind is int and value != int(value)):
      name = 'an integer' if kind is int else 'a number'
      raise self._wrong(key, name if least == -math.inf else f'{name} of at least {least}')
    return kind(value)

  def _bool(self, key) -> bool:
    value = self.raw.get(key)
    if value is not None and type(value) is not bool:
      raise self._wrong(key, 'true or false')
    return bool(value)

  def _list(self, key, value) -> tuple[int, ...]:
    """A list of ids, without those that the model does not have."""
    if not isinstance(value, list) or not all(type(i) is int for i in value):
      raise self._wrong(key, 'a list of token ids')
    valid = tuple(i for i in value if 0 <= i < self.model.vocab_size)
    if len(valid) < len(value):
      self._note(key, f'has ids beyond the vocabulary of {self.model.vocab_size}: ignored')
    return valid

  def _id(self, key) -> int | None:
    """One id; None for null or one that the model does not have.

    Of a list the first that may be generated: all of them are forced, with equal probability.
    """
    value = self.raw.get(key)
    if value is None:
      return None
    ids = self._list(key, value if isinstance(value, list) else [value])
    suppressed = self.values.get('suppress_tokens', ())
    return min(ids, key=lambda i: (i in suppressed, i), default=None)

  # -- groups of settings -------------------------------------------------------------------------

  def _read_ends(self, eos_id, default_eos):
    ends = self.raw.get('eos_token_id')
    ends = () if ends is None else self._list(
        'eos_token_id', ends if isinstance(ends, list) else [ends])
    if not ends and 0 <= default_eos < self.model.vocab_size:
      ends = (default_eos,)
    self.values['stop_ids'] = () if ends in ((), (eos_id,)) else tuple(dict.fromkeys(ends))

  def _read_numbers(self):
    for key, (kind, least, option) in SAME.items():
      if (value := self._number(key, kind, least)) is not None:
        self.values[option] = value
    if 'min_new_tokens' in self.values:
      self.values.pop('min_length', None)                 # the other takes precedence, even as 0
    if self.raw.get('top_p') is not None and not 0 < self.values['top_p'] <= 1:
      raise self._wrong('top_p', 'above 0 and at most 1')
    if self.raw.get('min_p') is not None and self.values['min_p'] > 1:
      raise self._wrong('min_p', 'between 0 and 1')
    if self.raw.get('repetition_penalty') == 0:
      raise self._wrong('repetition_penalty', 'above 0')

    early = self.raw.get('early_stopping')
    if early is not None:
      if early not in ('never', True, False) or type(early) not in (str, bool):
        raise self._wrong('early_stopping', "true, false or 'never'")
      self.values['early_stopping'] = str(early).lower()

    # Beams.
    beams = self.values.get('beams', 1)
    if beams > 1 and self.model.kind == 'decoder':
      self._note('num_beams', 'is ignored: beam search does not support decoder-only models')
      self.values['beams'] = beams = 1

    # Sampling. Without do_sample, transformers ignores what else is there; so does temperature=0.
    temperature = self._number('temperature', float, 0)
    if self._bool('do_sample'):
      if beams > 1:
        self._note('do_sample', f'is ignored: with num_beams={beams} the beams are searched, not '
                                'sampled')
      elif temperature == 0:
        self._note('temperature', 'with do_sample=true is greedy decoding here')
      else:
        self.values['temperature'] = 1. if temperature is None else temperature
        self.values.setdefault('top_k', TOP_K)

  def _read_lengths(self):
    new, total = (self._number(key, int, 1) for key in ('max_new_tokens', 'max_length'))
    decoder, limit = self.model.kind == 'decoder', self.model.max_length
    limit = limit if self.model.positions == 'learned' else 0
    if new is None and total is not None:
      if decoder:
        self.values['max_total'] = new = total
      elif total == 1:
        self._note('max_length', 'leaves no token to generate; ignored')
      else:
        new = total - 1                                   # theirs counts the start token
    if new is not None and limit and new > limit:
      key = 'max_new_tokens' if self.raw.get('max_new_tokens') else 'max_length'
      self._note(key, f'is more than the {limit} positions of the model, which are the limit here')
      new = limit - 1 if decoder else limit
      if 'max_total' in self.values:
        self.values['max_total'] = limit
    if new is not None:
      self.values['max_length'] = new

  def _read_ids(self):
    is_decoder = self.model.kind == 'decoder'
    for key in IDS:
      if self.raw.get(key) is not None:
        self.values[key] = self._list(key, self.raw[key])
    words = self.raw.get('bad_words_ids')
    if words is not None:
      if not isinstance(words, list) or not all(isinstance(word, list) and word for word in words):
        raise self._wrong('bad_words_ids', 'a list of lists of token ids')
      valid = [self._list('bad_words_ids', word) for word in words]
      self.values['bad_words_ids'] = tuple(
          ids for ids, word in zip(valid, words) if len(ids) == len(word))

    if (last := self._id('forced_eos_token_id')) is not None:
      self.values['forced_last'] = last
    first = self._id('forced_bos_token_id')
    if first is not None and is_decoder:
      self._note('forced_bos_token_id', 'is ignored: a decoder-only model continues its prompt')
    elif first is not None:
      self.values['forced_first'] = first
    if not is_decoder:
      key = 'bos_token_id' if self.raw.get('decoder_start_token_id') is None else (
          'decoder_start_token_id')
      start = self._id(key)
      if start is not None and start != self.model.start_id:
        self.values['start'] = start

  def _read_unsupported(self):
    active = [key for key, neutral in UNSUPPORTED.items()
              if self.raw.get(key) not in (None, [], {}, *neutral)]
    samples = self.values.get('temperature', 0) > 0
    beams = self.values.get('beams', 1) > 1
    for key in active:
      if key in SAMPLING and not samples or key in BEAMS and not beams:
        continue
      self._note(key, 'is not supported; generation ignores it')


def apply(raw: Mapping, c, *, default_eos: int,
          what: str) -> tuple[dict[str, Any], tuple[str, ...]]:
  """Reads generation settings into the config of converted weights -> (raw, notes). See `read`."""
  model = config.model_config(c)
  settings = read(raw, model, eos_id=model.eos_id, default_eos=default_eos, what=what)
  c.model.start_id, note = start_id(model, settings, model.eos_id)
  c.eval.update(settings.values)
  return settings.raw, settings.notes + ((note,) if note else ())


def start_id(model: TransformerConfig, settings: Settings, eos_id: int) -> tuple[int, str]:
  """(the model's start_id, which its embedding must have a row for, and a note or '').

  A decoder-only model needs it for empty prompts alone, so another one does no harm.
  Errors: UsageError for an encoder-decoder without a valid one.
  """
  size = model.vocab_size
  if 0 <= model.start_id < size:
    return model.start_id, ''
  said = f'config.json: the start token {model.start_id} is not in the vocabulary of {size}'
  if model.kind == 'decoder':
    start = eos_id if 0 <= eos_id < size else 0
    return start, f'{said}; an empty prompt starts with {start}'
  if 'start' not in settings.values:
    raise UsageError(f'{said}: give decoder_start_token_id a value from 0 to {size - 1}')
  return settings.values['start'], f'{said}; {settings.values["start"]} is'


def write_file(folder: Path, settings: Mapping) -> None:
  files.write_text(folder / NAME, json.dumps(settings, indent=2, ensure_ascii=False) + '\n')


def _short(value) -> str:
  text = ' '.join(repr(value).split())
  return text if len(text) < 80 else text[:77] + '…'


# -- and back -------------------------------------------------------------------------------------


def write(raw: Mapping, c, model: TransformerConfig) -> tuple[dict[str, Any], list[str]]:
  """(the content of generation_config.json for the model of a config, notes).

  raw: what the weights came with: it is changed where c.eval says something else, so that its other
  keys survive. {} for weights of ours.
  """
  e, out, notes = c.eval, dict(raw), []
  eos_id = vocab.load(c.data.vocab).eos_id if c.data.vocab else model.eos_id
  said = {**options.defaults(), **read(raw, model, eos_id=eos_id, default_eos=eos_id).values}
  changed = lambda option: said[option] != _as(tuple, e[option])

  # Ids.
  if not raw or changed('stop_ids'):
    stops = list(e.stop_ids) or [eos_id]
    out['eos_token_id'] = stops if len(stops) > 1 else stops[0]
  if not raw:
    out['pad_token_id'] = model.pad_id
    out['decoder_start_token_id' if model.enc_layers else 'bos_token_id'] = model.start_id
  if model.enc_layers and changed('start'):
    out['decoder_start_token_id'] = e.start if e.start >= 0 else model.start_id
  for option, key in (('forced_first', 'forced_bos_token_id'),
                      ('forced_last', 'forced_eos_token_id')):
    if changed(option):
      out[key] = e[option] if e[option] >= 0 else None
  for key in (*IDS, 'bad_words_ids'):
    if changed(key):
      out[key] = _as(list, e[key]) or None

  # Numbers. Those of beams and of sampling matter where they are used.
  samples = e.temperature > 0
  penalty_is_theirs = not e.alpha or e.length_penalty != 0
  unused = set()
  if not (e.beams > 1 and penalty_is_theirs):
    unused.add('length_penalty')
  if not samples:
    unused |= {'top_k', 'top_p', 'min_p'}
  for key, (_, _, option) in SAME.items():
    if key not in unused and changed(option):
      out[key] = e[option]
  if samples and out.get('top_k', TOP_K) != e.top_k:
    out['top_k'] = e.top_k
  if e.min_length and not e.min_new_tokens:
    out['min_new_tokens'] = None                          # would take precedence, even as 0
  if changed('temperature'):
    out['do_sample'] = samples
    if samples:
      out['temperature'] = e.temperature
  if e.beams > 1:
    if not penalty_is_theirs:
      notes.append(f'eval.alpha={e.alpha} has no equal in transformers, whose length_penalty is a '
                   'power of the length: its beams may rank outputs in another order')
    if changed('early_stopping'):
      out['early_stopping'] = {'true': True, 'false': False}.get(e.early_stopping, 'never')

  # Lengths.
  if e.max_length and e.max_length != said.get('max_length', config.usual_output_length(c)):
    out.update(max_length=None, max_new_tokens=e.max_length)
  elif e.max_total and changed('max_total'):
    out.update(max_length=e.max_total, max_new_tokens=None)
  return {key: value for key, value in out.items() if value is not None or key in raw}, notes


def _as(kind, value):
  """A value of the config with its lists, at any depth, as tuples or lists."""
  return kind(_as(kind, item) for item in value) if isinstance(value, (list, tuple)) else value
