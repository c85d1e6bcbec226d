"""The interface of every vocabulary: text <-> ids, special ids, sentinels, a chat.

The kinds are in tables.py, hf_tokenizers.py and gguf.py; vocab.load opens them by name.
"""
from collections.abc import Callable, Sequence
import dataclasses
import functools
import itertools
from typing import Any

from t5lab.data.vocab import chat
from t5lab.errors import DataError, UsageError, did_you_mean

UNKNOWN = ' \u2047 '              # sentencepiece prints it for an unknown piece


@dataclasses.dataclass(frozen=True, eq=False)
class Vocab:
  """A vocabulary with ids in [0, size), sentinels included. sha256: of everything that decides ids.
  """
  spec: str
  sha256: str
  size: int
  eos_id: int
  encoder: Callable[[str], list[int]]      # for text that is not empty
  decoder: Callable[[list[int]], str]      # for any ids before the first end of sequence
  piece: Callable[[int], str]
  pad_id: int = 0                          # rows are padded with 0 in any case: segment ids decide
  unk_id: int | None = None
  bos_id: int | None = None
  mask_id: int | None = None
  cls_id: int | None = None
  sep_id: int | None = None
  sentinels: Sequence[int] = ()            # ids of <extra_id_0>, <extra_id_1>, …
  prefix: tuple[int, ...] = ()             # ids before an encoder's input and a decoder's target
  suffix: tuple[int, ...] = ()             # ids after the end of an encoder's input
  middle: tuple[int, ...] | None = ()      # ids between the end of a text and a second one; None:
                                           # the tokenizer joins two texts in another way
  second_type: bool = True                 # tokens after the first end have token type 1
  languages: dict[str, int] = dataclasses.field(default_factory=dict)   # ids of language codes
  target_language: int | None = None       # of targets; the prefix or suffix has that of inputs
  language_starts: bool = False            # a decoder reads its language first (mBART)
  starts_with_bos: bool = False            # texts start with bos_id and have no end of sequence
  ends_with_eos: bool = False              # the tokenizer itself puts eos_id after a text
  target_encoder: Callable[[str], list[int]] | None = None   # if targets have other ids
  chat_template: str | dict[str, str] | None = None    # one, or several by name
  names: dict[str, str] = dataclasses.field(default_factory=dict)   # 'eos' -> '</s>', for the chat
  special: dict[str, int] = dataclasses.field(default_factory=dict)   # special and added tokens

  def __repr__(self):
    return f'Vocab({self.spec!r}, size={self.size}, sha256={self.sha256[:12]})'

  @property
  def num_sentinels(self) -> int:
    return len(self.sentinels)

  @property
  def sentinel_step(self) -> int:
    """The step from a sentinel's id to the next one's: -1 (T5's) or 1; 0 if it is not constant."""
    steps = {b - a for a, b in itertools.pairwise(self.sentinels)} or {-1}
    return steps.pop() if steps in ({-1}, {1}) else 0

  def sentinel(self, i: int) -> int:
    if not 0 <= i < self.num_sentinels:
      raise ValueError(f'sentinel {i} of {self.num_sentinels}')
    return self.sentinels[i]

  def encode(self, text: str) -> list[int]:
    """The ids of the text, without special ids around it. '<extra_id_N>' becomes sentinel N."""
    return self._encode(text, self.encoder)

  def encode_target(self, text: str) -> list[int]:
    return self._encode(text, self.target_encoder or self.encoder)

  def _encode(self, text, encoder):
    try:
      text.encode('utf-8')
    except UnicodeEncodeError as e:
      raise DataError(f'text with a lone surrogate U+{ord(text[e.start]):04X} at character '
                      f'{e.start} is not Unicode text: decode the file as UTF-8.') from e
    return list(encoder(text)) if text else []

  def frame(self, *texts: str) -> list[int]:
    """An encoder's input: the prefix, each text followed by the end of sequence, the suffix.

    RoBERTa's tokenizer has another end between two texts. UsageError for two texts, if the
    tokenizer joins them without ends.
    """
    if len(texts) > 1 and self.middle is None:
      raise UsageError(f'vocabulary {self.spec!r} does not end the first of two texts as it ends '
                       'one text: pairs are not supported')
    ids = list(self.prefix)
    for number, text in enumerate(texts):
      ids += [*(self.middle or () if number else ()), *self.encode(text), self.eos_id]
    return [*ids, *self.suffix]

  @property
  def target_prefix(self) -> tuple[int, ...]:
    """The ids before a decoder's target."""
    if self.language_starts:
      return ()
    return self.prefix if self.target_language is None else (self.target_language,)

  def between(self, source: str | None, target: str | None) -> 'Vocab':
    """This vocabulary for inputs and targets in other languages, by code; None: as they are.

    UsageError for a code that it does not have, and if texts are not marked with a language.
    """
    for code in (source, target):
      if code is not None and code not in self.languages:
        raise UsageError(
            f'vocabulary {self.spec!r} has no language {code!r}.'
            f'{did_you_mean(code, self.languages)} It has: {", ".join(self.languages) or "none"}')
    marks, changes = set(self.languages.values()), {}
    if source is not None:
      mark = lambda ids: tuple(self.languages[source] if i in marks else i for i in ids)
      changes = {'prefix': mark(self.prefix), 'suffix': mark(self.suffix)}
    if target is not None:
      changes['target_language'] = self.languages[target]
    return dataclasses.replace(self, **changes)

  def decode(self, ids) -> str:
    """The text up to the first end of sequence.

    Padding and special ids print nothing, invalid ids U+2047, and broken UTF-8 U+FFFD.
    """
    ids = list(map(int, ids))
    return self.decoder(ids[:ids.index(self.eos_id)] if self.eos_id in ids else ids)

  def pieces(self, ids) -> list[str]:
    """The text of each id by itself, for showing what a model sees."""
    return [self.piece(int(i)) for i in ids]

  def chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True, *,
           template: str = '', **options) -> str:
    """Renders [{'role', 'content'}, …] with the model's chat template.

    template: the name of one of several. options: tools, documents and date, see `chat.render`.
    DataError if there is no template, if it fails, or if the messages are malformed.
    """
    text = chat.choose(self.chat_template, template, bool(options.get('tools')), self.spec)
    return chat.render(text, messages, self.names, add_generation_prompt, self.spec, **options)

  @functools.cached_property
  def end_of_turn(self) -> int | None:
    """The special token that the chat template writes after a reply; None if it writes none.

    It may be in no file that names the ids which end a text, e.g. <|im_end|>.
    """
    return chat.end_of_turn(lambda messages: self.chat(messages, False), self.special)


def special_fields(ids: dict[str, int]) -> dict[str, Any]:
  """{role: id} -> the fields of a Vocab. Without padding, the end of sequence pads."""
  return {'pad_id': ids['eos'], **{f'{role}_id': i for role, i in ids.items()}}


def numbered_sentinels(ids: dict[str, int]) -> list[int]:
  """{text: id} of a vocabulary -> the ids of <extra_id_0>, <extra_id_1>, … up to the first gap."""
  numbered = (ids.get(f'<extra_id_{n}>') for n in itertools.count())
  return list(itertools.takewhile(lambda i: i is not None, numbered))
