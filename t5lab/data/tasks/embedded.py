"""The tasks over the corpora inside the package, and their mixture."""
from t5lab.data.sources import corpora
from t5lab.data.tasks import parts, prompts
from t5lab.data.tasks import text as text_tasks
from t5lab.data.tasks.seqio_tf import seqio, tf, token_lists
from t5lab.evaluation import metrics

SUPERVISED = tuple(prompts.PROMPTS)
TEXT = tuple(f'books_{objective}' for objective in text_tasks.OBJECTIVES)
CLASSES = ('docs_match',)
NAMES = (*SUPERVISED, *TEXT, *CLASSES)
MIXTURE = 'embedded_supervised'
MIXED = tuple(task for task in SUPERVISED if task not in prompts.BARE)


def _source(corpus: str, columns: tuple[str, ...]) -> seqio.FunctionDataSource:
  """Text columns of an embedded corpus; 'answers' is the list of answer texts."""

  def dataset(split, shuffle_files, seed=None):
    del shuffle_files, seed  # the task's shuffle buffer holds the whole corpus
    rows = corpora.load(corpus, split)
    table = {c: [row[c] for row in rows] for c in columns if c != 'answers'}
    if 'answers' in columns:
      table['answers'] = tf.ragged.constant([row['answers']['text'] for row in rows])
    return tf.data.Dataset.from_tensor_slices(table)

  splits = ('train', 'validation')
  return seqio.FunctionDataSource(
      dataset, splits, num_input_examples={s: corpora.num_rows(corpus, s) for s in splits})


def _pad_answers(rows, output_features):
  """Gold answers padded as the text is: scoring padded predictions against raw ones loses EM."""
  del output_features
  answers = rows['answers'].with_flat_values(
      parts.texts(prompts.pad_punctuation, rows['answers'].flat_values))
  return {**rows, 'answers': answers, 'target': answers[:, :1].flat_values}


def _matched(rows, output_features):
  """Both texts in one input, each but the last closed here; targets is the class."""
  v = output_features['inputs'].vocabulary.vocab
  pair = lambda summary, document: v.frame(summary, document)[:-1]
  return {'inputs': token_lists(pair, rows['summary'], rows['document']),
          'targets': tf.cast(rows['match'], tf.int32)[:, None]}


def register_mixtures() -> None:
  seqio.MixtureRegistry.add(
      MIXTURE, MIXED, default_rate=lambda task: task.num_input_examples('train'))


def register(spec: str) -> None:
  """Adds the tasks on the vocabulary `spec`."""
  for pair, language in (('ende', 'de'), ('enfr', 'fr'), ('enes', 'es')):
    parts.add_supervised(f'ha_{pair}', spec, _source(pair, ('en', language)), language,
                         (metrics.bleu, metrics.chrf))
  parts.add_supervised('docs_summarize', spec, _source('summarize', ('document', 'summary')),
                       'summary', (metrics.rouge,))
  parts.add_supervised(
      'numpydoc_qa', spec, _source('qa', ('id', 'question', 'context', 'answers')), 'target',
      (metrics.squad,), first=(_pad_answers,), postprocess_fn=parts.answers)
  parts.add_supervised('g2p_en_us', spec, _source('g2p', ('word', 'phonemes')), 'phonemes',
                       (metrics.exact_match, metrics.phoneme_error_rate))
  parts.add('docs_match', spec, _source('match', ('document', 'summary', 'match')),
            [parts.by_batch(_matched), seqio.preprocessors.append_eos_after_trim], classes=2)
  for objective in text_tasks.OBJECTIVES:
    text_tasks.add(f'books_{objective}', spec, _source('books', ('text',)), objective)
