"""What every kind of vocabulary is to the rest: text <-> ids, special ids, sentinels, a chat.

The kinds: vocab_tables.py, vocab_tokenizers.py, vocab_gguf.py; vocab.py opens them by name.
"""
from collections.abc import Callable, Sequence
import dataclasses
import itertools
import re

from t5lab.data.vocab import chat
from t5lab.errors import DataError

UNKNOWN = ' \u2047 '              # what sentencepiece prints for an unknown piece


@dataclasses.dataclass(frozen=True, eq=False)
class Vocab:
  """One vocabulary: ids in [0, size), sentinels included. `sha256`: of all that decides its ids."""
  spec: str
  sha256: str
  size: int
  eos_id: int
  encoder: Callable[[str], list[int]]      # of a text that is not empty
  decoder: Callable[[list[int]], str]      # of any ids before the first end of sequence
  piece: Callable[[int], str]
  pad_id: int = 0                          # rows are padded with 0 all the same: segment ids decide
  unk_id: int | None = None
  bos_id: int | None = None
  mask_id: int | None = None
  cls_id: int | None = None
  sep_id: int | None = None
  sentinels: Sequence[int] = ()            # ids of <extra_id_0>, <extra_id_1>, …
  prefix: tuple[int, ...] = ()             # ids before an encoder's input and a decoder's target
  starts_with_bos: bool = False            # opens texts with bos_id, and does not close them
  target_encoder: Callable[[str], list[int]] | None = None   # where targets have other ids
  chat_template: str | None = None
  names: dict[str, str] = dataclasses.field(default_factory=dict)   # 'eos' -> '</s>', for the chat

  def __repr__(self):
    return f'Vocab({self.spec!r}, size={self.size}, sha256={self.sha256[:12]})'

  @property
  def num_sentinels(self) -> int:
    return len(self.sentinels)

  @property
  def sentinel_step(self) -> int:
    """From a sentinel's id to the next one's: -1 (T5's), 1, or 0 if they do not stand in a row."""
    steps = {b - a for a, b in itertools.pairwise(self.sentinels)} or {-1}
    return steps.pop() if steps in ({-1}, {1}) else 0

  def sentinel(self, i: int) -> int:
    if not 0 <= i < self.num_sentinels:
      raise ValueError(f'sentinel {i} of {self.num_sentinels}')
    return self.sentinels[i]

  def encode(self, text: str) -> list[int]:
    """Ids of the text, none put before or after. '<extra_id_N>' in the text becomes sentinel N."""
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
    """An encoder's input: the prefix, then each text closed by the end of sequence."""
    ids = list(self.prefix)
    for text in texts:
      ids += [*self.encode(text), self.eos_id]
    return ids

  def decode(self, ids) -> str:
    """Text up to the first end of sequence; pads and special ids print nothing, ids that are none
    print U+2047, broken UTF-8 prints U+FFFD."""
    ids = list(map(int, ids))
    return self.decoder(ids[:ids.index(self.eos_id)] if self.eos_id in ids else ids)

  def pieces(self, ids) -> list[str]:
    """The text of each id alone, for showing what a model sees."""
    return [self.piece(int(i)) for i in ids]

  def chat(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """[{'role', 'content'}] -> the text that the model's chat template makes of them.

    DataError if there is no template, if it fails, or if the messages are of another form.
    """
    if not self.chat_template:
      raise DataError(f'vocabulary {self.spec!r} has no chat template: give the model plain text')
    return chat.render(self.chat_template, messages, self.names, add_generation_prompt, self.spec)


def splitter(special: dict[str, int], marks: str = '') -> re.Pattern | None:
  """Splits a text at every special token (the longest that fits), and at runs of `marks`."""
  parts = [re.escape(text) for text in sorted(special, key=len, reverse=True) if text]
  if marks:
    parts.append(f'[{marks}]+')
  return re.compile(f'({"|".join(parts)})') if parts else None


def numbered_sentinels(ids: dict[str, int]) -> list[int]:
  """{text: id} of a vocabulary -> the ids of <extra_id_0>, <extra_id_1>, … up to the first gap."""
  return list(itertools.takewhile(lambda i: i is not None, (
      ids.get(f'<extra_id_{n}>') for n in itertools.count())))
