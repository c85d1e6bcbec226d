"""Chat templates: rendered as by Hugging Face, in a sandbox."""

import datetime
import json

import pytest
import tokenizers

from t5lab.data import vocab
from t5lab.data.vocab import chat, tokenizer_config
from t5lab.errors import DataError

HI = [{'role': 'user', 'content': 'Hi'}]


def render(template, messages=HI, prompt=True, options=None, **tokens):
  return chat.render(template, messages, {'bos': '<s>', 'eos': '</s>', **tokens},
                     prompt, 'x.gguf', **(options or {}))


def test_a_template_of_chatml():
  template = """{% for message in messages %}
    {% if message['role'] not in ['user', 'system'] %}{% continue %}{% endif %}
{{ bos_token + message['role'] }}: {{ message.content | trim }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}
assistant:
{%- endif %}
{{ pad_token is defined }}{{ tools is none }}"""
  messages = [{'role': 'system', 'content': ' Be brief. '}, {'role': 'tool', 'content': 'x'}, *HI]
  turns = '<s>system: Be brief.</s>\n<s>user: Hi</s>\n'
  assert render(template, messages) == turns + 'assistant:FalseTrue'
  assert render(template, messages, prompt=False, pad='<p>') == turns + 'TrueTrue'


def test_hugging_face_renders_the_same():
  rendering = pytest.importorskip('transformers.utils.chat_template_utils')
  template = ("{%- for m in messages %}\n  {%- if m.role == 'user' %}\n[{{ m.content|tojson }}]\n"
              '  {%- else %}\n  {%- generation %}{% set x = 1 %}<{{ m.content }}>\n'
              '  {%- endgeneration %}{{ x is defined }}\n  {% generation %}\n  {% endgeneration %}'
              "  {%- endif %}\n{%- endfor %}\n{{ strftime_now('%Y %B') }} {{ tools }}\n"
              '{% if add_generation_prompt %}\n  >{% endif %}\n')
  messages = [*HI, {'role': 'assistant', 'content': 'x'}, {'role': 'user', 'content': '"é"<\n'}]
  expected, _ = rendering.render_jinja_template(
      [messages], chat_template=template, add_generation_prompt=True)
  assert render(template, messages) == expected[0] and '<x>' in expected[0]


@pytest.mark.parametrize('template, message', [
    ("{{ raise_exception('roles must alternate') }}", 'x.gguf failed: roles must alternate'),
    ('{% for %}', 'x.gguf failed: Expected an expression'),
    ('{{ messages[0].nothing.more }}', 'x.gguf failed'),
    ('{{ 1 / 0 }}', 'x.gguf failed: division by zero'),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", 'x.gguf failed.*unsafe'),
    ('{{ messages.append(1) }}', 'x.gguf failed: .*append.* is unsafe'),
    ("{% include '/etc/passwd' %}", 'x.gguf failed: no loader'),
    ('{% for i in range(9999999) %}x{% endfor %}', 'x.gguf failed: Range too big'),
    ("{{ 'x' * 10**12 }}", 'x.gguf failed: MemoryError'),
    ("{{ 'x'.center(10**11) }}", 'x.gguf failed: MemoryError'),
    ("{% set n = namespace(x='x') %}{% for i in range(50) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
     'x.gguf failed: MemoryError'),
    ("{{ strftime_now('%999999999Y') }}", 'failed: .*a width is not supported'),
    ('{{ strftime_now(3) }}', 'x.gguf failed: '),
    ('{% generation %}x', 'x.gguf failed: Unexpected end of template'),
    ("{% for i in range(99999) %}{{ 'x' * 99 }}{% endfor %}",
     'failed: it generates more than 1,000,6'),
    ('x' * 1_000_001, 'has 1,000,001 characters; the limit is 1,000,000'),
])
def test_a_template_that_fails_or_overreaches(template, message):
  with pytest.raises(DataError, match=message) as e:
    render(template)
  assert '\n' not in str(e.value)


@pytest.mark.parametrize('messages', [[], 'Hi', [{'role': 'user'}], [{'role': 1, 'content': 'x'}],
                                      ['Hi'], [{'role': 'user', 'content': None}]])
def test_malformed_messages(messages):
  with pytest.raises(DataError, match='a chat must be a list of .*; got '):
    render('x', messages)


CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
          "{% endfor %}")
LLAMA_2 = ("{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
           "{% else %}{{ m.content + ' ' + eos_token }}{% endif %}{% endfor %}")
SPECIAL = {'<|im_start|>': 4, '<|im_end|>': 5, '</s>': 2, '<end>': 6, '<end>x': 7, '': 8}


@pytest.mark.parametrize('template, expected', [
    (CHATML, 5), (LLAMA_2, 2), (CHATML.replace('<|im_end|>', '\n <|im_end|></s>'), 5),
    (CHATML.replace('<|im_end|>', '<end>x'), 7), (CHATML.replace('<|im_end|>', '<other>'), None),
    (CHATML.replace('<|im_end|>', ' bye<|im_end|>'), None),
    ('{{ messages[0].content }}', None), ("{{ raise_exception('no replies') }}", None),
    ('{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}', None)],
    ids=['ChatML', 'LLaMA 2', 'spaces', 'longest', 'not special', 'text', 'no reply', 'fails',
         'another text'])
def test_the_token_that_ends_a_turn(template, expected):
  assert chat.end_of_turn(lambda messages: render(template, messages, False), SPECIAL) == expected


def test_an_endless_template_is_stopped(monkeypatch):
  """Loops that print nothing, and a number that takes for ever."""
  monkeypatch.setattr(chat, 'SECONDS', 1)
  for template in ('{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}',
                   '{{ 10 ** (10 ** 9) }}'):
    with pytest.raises(DataError, match='ended a process with a limit of 1 s and 512 MiB'):
      render(template)


# -- the date, tools and named templates -----------------------------------------------------------

GUARDED = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% else %}no{% endif %}"


@pytest.mark.parametrize('template', [GUARDED, "{{ strftime_now('%d %b %Y') }}"])
def test_the_date_is_today_or_the_one_that_is_given(template):
  assert render(template, options=dict(date='2024-07-26')) == '26 Jul 2024'
  days = {datetime.date.today().strftime('%d %b %Y')}
  got = render(template)
  assert got in days | {datetime.date.today().strftime('%d %b %Y')}


def test_tools_and_documents():
  template = '{{ tools|tojson }}{% for d in documents %}{{ d.title }}{% endfor %}'
  tools = [{'type': 'function', 'function': {'name': 'f'}}]
  got = render(template, options=dict(tools=tools, documents=[{'title': 'A'}, {'title': 'B'}]))
  assert got == json.dumps(tools) + 'AB'
  with pytest.raises(DataError, match='must hold JSON values'):
    render(template, options=dict(tools=[{'f': print}]))


NAMED = [{'name': 'default', 'template': 'D'}, {'name': 'rag', 'template': 'R'},
         {'name': 'tool_use', 'template': 'T'}]


def write(folder, files):
  for name, content in files.items():
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content if name.endswith('.jinja') else json.dumps(content))


@pytest.mark.parametrize('files, expected', [
    ({'tokenizer_config.json': {'chat_template': 'x'}}, {'': 'x', 'default': 'x'}),
    ({'tokenizer_config.json': {'chat_template': NAMED}},
     {'': 'D', 'rag': 'R', 'tool_use': 'T', 'default': 'D'}),
    ({'tokenizer_config.json': {'chat_template': {'default': 'D', 'rag': 'R'}}},
     {'': 'D', 'rag': 'R'}),
    ({'chat_template.json': {'chat_template': 'p'}}, {'': 'p'}),
    ({'chat_template.json': {'chat_template': NAMED}}, {'': 'D', 'rag': 'R'}),
    ({'chat_template.json': {'chat_template': 'p'}, 'chat_template.jinja': 'j'}, {'': 'j'}),
    ({'chat_template.json': {'chat_template': 'p'}, 'tokenizer_config.json': {
        'chat_template': 'x'}}, {'': 'x'}),
    ({'chat_template.jinja': 'j', 'additional_chat_templates/rag.jinja': 'r',
      'tokenizer_config.json': {'chat_template': NAMED}}, {'': 'j', 'rag': 'r', 'tool_use': None}),
    ({'additional_chat_templates/rag.jinja': 'r'}, {'rag': 'r', '': None}),
    ({'tokenizer_config.json': {'chat_template': [3, {'name': 'default'}]}}, {'': None}),
    ({}, {'': None}),
])
def test_which_template_is_used(files, expected, tmp_path, monkeypatch):
  monkeypatch.setattr(chat, 'render', lambda template, *args, **options: template)
  write(tmp_path, files)
  write(tmp_path, {'characters.json': dict(inputs='0123a', targets='0123a', pad_id=0, bos_id=1,
                                           eos_id=2, unk_id=3)})
  paths = [p for p in tmp_path.rglob('*') if p.is_file()]
  config = tokenizer_config.config(
      {str(p.relative_to(tmp_path)): p.read_bytes() for p in paths}, tmp_path)
  for name, text in expected.items():
    if text is None:
      with pytest.raises(DataError, match='has no chat template'):
        chat.choose(config.chat_template, name, False, 'x')
    else:
      assert chat.choose(config.chat_template, name, False, 'x') == text


def test_tools_choose_their_template():
  named = {entry['name']: entry['template'] for entry in NAMED}
  assert chat.choose(named, '', True, 'x') == 'T'
  assert chat.choose(named, 'rag', True, 'x') == 'R'
  assert chat.choose({'default': 'D'}, '', True, 'x') == 'D'
  with pytest.raises(DataError, match="template 'ragg'. Did you"):
    chat.choose(named, 'ragg', False, 'x')


def test_templates_go_along_with_the_vocabulary(tmp_path):
  tokens = {'<unk>': 0, '</s>': 1, 'a': 2}
  tokenizers.Tokenizer(tokenizers.models.WordLevel(tokens, '<unk>')).save(
      str(tmp_path / 'tokenizer.json'))
  write(tmp_path, {'tokenizer_config.json': dict(eos_token='</s>', unk_token='<unk>'),
                   'chat_template.jinja': '{{ eos_token }}',
                   'additional_chat_templates/rag.jinja': "{{ strftime_now('%Y') }}"})
  v = vocab.load(str(tmp_path / 'tokenizer.json'))
  copy = vocab.load(vocab.export(v.spec, tmp_path / 'copy'))
  for each in (v, copy):
    assert each.chat(HI) == '</s>'
    assert each.chat(HI, template='rag', date='1999-01-01') == '1999'
