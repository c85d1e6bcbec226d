"""The tasks over the corpora inside the package, as plain data; builtin.py registers them."""
from collections.abc import Callable
import dataclasses
from types import MappingProxyType

from t5lab.data.objectives import table
from t5lab.data.tasks import prompts
from t5lab.evaluation import metrics


@dataclasses.dataclass(frozen=True)
class Supervised:
  """A corpus, its columns that are read, and the column of the targets. Inputs: see prompts.py."""
  corpus: str
  columns: tuple[str, ...]
  target: str
  metric_fns: tuple[Callable, ...]


_TRANSLATION = (metrics.bleu, metrics.chrf)
SUPERVISED = MappingProxyType({
    'ha_ende': Supervised('ende', ('en', 'de'), 'de', _TRANSLATION),
    'ha_enfr': Supervised('enfr', ('en', 'fr'), 'fr', _TRANSLATION),
    'ha_enes': Supervised('enes', ('en', 'es'), 'es', _TRANSLATION),
    'docs_summarize': Supervised(
        'summarize', ('document', 'summary'), 'summary', (metrics.rouge,)),
    'numpydoc_qa': Supervised(
        'qa', ('id', 'question', 'context', 'answers'), 'target', (metrics.squad,)),
    'g2p_en_us': Supervised(
        'g2p', ('word', 'phonemes'), 'phonemes',
        (metrics.exact_match, metrics.phoneme_error_rate)),
})
TEXT = MappingProxyType({f'books_{objective}': objective for objective in table.TABLE})
NAMES = (*SUPERVISED, *TEXT, 'docs_match')

MIXTURE = 'embedded_supervised'
MIXED = tuple(task for task in SUPERVISED if task not in prompts.BARE)
