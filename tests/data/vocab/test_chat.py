"""Chat templates: rendered as by Hugging Face, in a sandbox."""

import pytest

from t5lab.data.vocab import chat
from t5lab.errors import DataError

HI = [{'role': 'user', 'content': 'Hi'}]


def render(template, messages=HI, prompt=True, **tokens):
  return chat.render(template, messages, {'bos': '<s>', 'eos': '</s>', **tokens},
                     prompt, 'x.gguf')


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
              '  {%- endif %}\n{%- endfor %}\n{% if add_generation_prompt %}\n  >{% endif %}\n')
  messages = [*HI, {'role': 'assistant', 'content': 'x'}, {'role': 'user', 'content': '"é"<\n'}]
  expected, _ = rendering.render_jinja_template(
      [messages], chat_template=template, add_generation_prompt=True)
  assert render(template, messages) == expected[0]


@pytest.mark.parametrize('template, message', [
    ("{{ raise_exception('roles must alternate') }}", 'x.gguf failed: roles must alternate'),
    ('{% for %}', 'x.gguf failed: Expected an expression'),
    ('{{ messages[0].nothing.more }}', 'x.gguf failed'),
    ('{{ 1 / 0 }}', 'x.gguf failed: division by zero'),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", 'x.gguf failed.*unsafe'),
    ('{{ messages.append(1) }}', 'x.gguf failed: .*append.* is unsafe'),
    ("{% include '/etc/passwd' %}", 'x.gguf failed: no loader'),
    ('{% for i in range(9999999) %}x{% endfor %}', 'x.gguf failed: Range too big'),
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
