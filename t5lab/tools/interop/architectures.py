"""The table of Hugging Face's architectures that convert, and of those that were left out and why.

The refusals and `t5lab convert --help` read it. `python -m t5lab.tools.interop.architectures`
writes it into README.md and docs/weights.md, between their markers.
"""

import dataclasses
from pathlib import Path
import textwrap

from t5lab.errors import did_you_mean
from t5lab.tools.interop.formats import bart, bert, gpt2, llama, t5, t5gemma
from t5lab.tools.interop.formats.format import Format


@dataclasses.dataclass(frozen=True)
class Architecture:
  """title: what people call it. model_types: of config.json. classes: of transformers. families:
  the rows of models/families.py, by their first part. note: what does not convert.
  """
  title: str
  model_types: tuple[str, ...]
  classes: tuple[str, ...]
  families: tuple[str, ...]
  format: Format
  note: str = ''


def _bert_like(*names: str) -> tuple[str, ...]:
  heads = ('Model', 'ForMaskedLM', 'ForSequenceClassification', 'ForTokenClassification',
           'ForQuestionAnswering')
  return tuple(f'{name}{head}' for name in names for head in heads)


TABLE = (
    Architecture(
        'T5, T5 1.1, Flan-T5, mT5, ByT5, UL2', ('t5', 'mt5'),
        ('T5ForConditionalGeneration', 'T5EncoderModel', 'MT5ForConditionalGeneration',
         'MT5EncoderModel', 'T5ForTokenClassification', 'MT5ForTokenClassification'),
        ('t5_1_0', 't5_1_1', 't5_1_1_lm', 'flan_t5', 'mt5', 'byt5', 'ul2', 'tiny'), t5.T5),
    Architecture('umT5', ('umt5',), ('UMT5ForConditionalGeneration', 'UMT5EncoderModel',
                                     'UMT5ForTokenClassification'), ('umt5',), t5.T5),
    Architecture('LongT5', ('longt5',), ('LongT5ForConditionalGeneration', 'LongT5EncoderModel'),
                 ('longt5_local', 'longt5_tglobal'), t5.T5),
    Architecture('Switch', ('switch_transformers',),
                 ('SwitchTransformersForConditionalGeneration',), ('switch',), t5.T5,
                 'only read: its capacity is a number of tokens, ours a factor'),
    Architecture('T5Gemma', ('t5gemma',), ('T5GemmaForConditionalGeneration',), ('t5gemma',),
                 t5gemma.T5GEMMA, 'both stacks must have one size'),
    Architecture('T5Gemma 2 (text)', ('t5gemma2',), ('T5Gemma2ForConditionalGeneration',),
                 ('t5gemma2',), t5gemma.T5GEMMA2,
                 'only read, without its image encoder and the embedding of the '
                 'token that ends an image; needs `[parity]`'),
    Architecture('BART', ('bart',), ('BartForConditionalGeneration',), ('bart',), bart.BART),
    Architecture('mBART, mBART-50', ('mbart',), ('MBartForConditionalGeneration',),
                 ('mbart', 'mbart50'), bart.MBART),
    Architecture('Marian (OPUS-MT)', ('marian',), ('MarianMTModel',), ('marian',), bart.MARIAN,
                 'two vocabularies must have one size'),
    Architecture('Pegasus', ('pegasus',), ('PegasusForConditionalGeneration',), ('pegasus',),
                 bart.PEGASUS),
    Architecture('M2M100, NLLB', ('m2m_100',), ('M2M100ForConditionalGeneration',),
                 ('m2m100', 'nllb'), bart.M2M100),
    Architecture('Blenderbot', ('blenderbot',), ('BlenderbotForConditionalGeneration',),
                 ('blenderbot',), bart.BLENDERBOT),
    Architecture('GPT-2, GPT-3 sizes', ('gpt2',), ('GPT2LMHeadModel',), ('gpt2', 'gpt3'),
                 gpt2.GPT2),
    Architecture('LLaMA 1 to 3, SmolLM2', ('llama',), ('LlamaForCausalLM',),
                 ('llama1', 'llama2', 'llama3', 'llama3_1', 'smollm2'), llama.LLAMA),
    Architecture('Mistral', ('mistral',), ('MistralForCausalLM',), ('mistral',), llama.MISTRAL),
    Architecture('Qwen 2, Qwen 2.5', ('qwen2',), ('Qwen2ForCausalLM',), ('qwen2',), llama.QWEN2),
    Architecture('Qwen 3', ('qwen3',), ('Qwen3ForCausalLM',), ('qwen3',), llama.QWEN3),
    Architecture('Gemma', ('gemma',), ('GemmaForCausalLM',), ('gemma',), llama.GEMMA),
    Architecture('Gemma 2', ('gemma2',), ('Gemma2ForCausalLM',), ('gemma2',), llama.GEMMA2),
    Architecture('Gemma 3 (text)', ('gemma3_text',), ('Gemma3ForCausalLM',), ('gemma3',),
                 llama.GEMMA3),
    Architecture('BERT, MiniLM', ('bert',), ('BertForPreTraining', *_bert_like('Bert')),
                 ('bert', 'minilm'), bert.BERT),
    Architecture('RoBERTa, XLM-R, CamemBERT', ('roberta', 'xlm-roberta', 'camembert'),
                 _bert_like('Roberta', 'XLMRoberta', 'Camembert'), ('roberta', 'xlm_roberta'),
                 bert.ROBERTA),
    Architecture('DistilBERT', ('distilbert',), _bert_like('DistilBert'), ('distilbert',),
                 bert.DISTILBERT),
)
FORMATS = {kind: row.format for row in TABLE for kind in row.model_types}

# model_type: why it does not convert
LEFT_OUT = {
    'gemma3': 'it reads images too; save its language model alone, which is a gemma3_text',
    'modernbert': 'its first layer has no norm before the attention, so its layers are unlike',
    'blenderbot-small': 'it adds the positions after the norm of the embeddings',
    'nllb-moe': 'its experts are routed by another rule than ours',
    'switch': 'its model_type is switch_transformers',
    'led': "its attention is sparse in another way than LongT5's",
    'pegasus_x': "its attention is sparse in another way than LongT5's",
    'bigbird_pegasus': "its attention is sparse in another way than LongT5's",
    'mixtral': 'its experts are routed by another rule than ours',
    'qwen2_moe': 'its experts are routed by another rule than ours',
    'qwen3_moe': 'its experts are routed by another rule than ours',
    'albert': 'its layers share their weights',
    'deberta': 'its attention separates content and position',
    'deberta-v2': 'its attention separates content and position',
    'electra': 'its embeddings have another width than its layers',
    'phi': 'attention and feed-forward read the same norm', 'gptj': 'attention and feed-forward '
    'read the same norm', 'gpt_neox': 'attention and feed-forward read their input in parallel',
    'falcon': 'attention and feed-forward read their input in parallel',
    'bloom': 'its positions are ALiBi', 'mpt': 'its positions are ALiBi',
}


def classes(model_type: str) -> tuple[str, ...]:
  """Returns the classes of transformers that convert."""
  return next(row.classes for row in TABLE if model_type in row.model_types)


def refusal(model_type) -> str:
  """Returns the message about a model_type without a format."""
  if why := LEFT_OUT.get(model_type if isinstance(model_type, str) else ''):
    return f'config.json: model_type {model_type!r} is not supported: {why}'
  return (f'config.json: model_type {model_type!r} is unknown.'
          f'{did_you_mean(str(model_type), FORMATS)}')


def titles() -> str:
  """Returns what the rows are called, as a sentence of 100 columns."""
  return textwrap.fill(', '.join(row.title for row in TABLE) + '.', 100) + '\n'


def markdown() -> str:
  """Returns the table in Markdown, and below it what was left out."""
  lines = ['| Model | `model_type` | Classes of transformers | Rows of `t5lab.models.families` |',
           '|---|---|---|---|']
  code = lambda names, end='': ', '.join(f'`{name}{end}`' for name in names)
  for row in TABLE:
    title = f'{row.title}; {row.note}' if row.note else row.title
    lines.append(f'| {title} | {code(row.model_types)} | {code(row.classes)} | '
                 f'{code(row.families, "/…")} |')
  reasons = {}
  for kind, why in LEFT_OUT.items():
    reasons.setdefault(why, []).append(kind)
  lines += ['', '| Left out | Why |', '|---|---|']
  lines += [f'| {code(kinds)} | {why} |' for why, kinds in reasons.items()]
  return '\n'.join(lines) + '\n'


MARKERS = '<!-- t5lab.tools.interop.architectures: do not edit -->\n', '<!-- end -->\n'
PAGES = {'README.md': titles, 'docs/weights.md': markdown}


def page(text: str, table: str) -> str:
  """Returns a page's text with the table between the markers."""
  start, end = MARKERS
  before, _, rest = text.partition(start)
  return before + start + table + end + rest.partition(end)[2]


def main() -> None:
  for name, table in PAGES.items():
    path = Path(name)
    path.write_text(page(path.read_text(), table()))


if __name__ == '__main__':
  main()
